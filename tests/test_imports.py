"""What imports cost and what they do not pull in; each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lite_core

PLUGINS = ("lora_lite_lora", "lora_lite_svd", "lora_lite_ortho")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> set[str]:
    """The top-level modules that the code leaves imported."""
    return set(
        json.loads(
            python(
                f"import sys, json\n{code}\nprint('\\n' + json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
            ).splitlines()[-1]
        )
    )


def test_listing_imports_neither_torch_nor_plugins() -> None:
    code = """
import lora_lite as ll, lora_lite_core
repr(ll.list_variants()); "pissa" in ll.list_variants(); ll.list_variants()[0].summary; dir(ll)
from lora_lite_core.cli import main
main(["variants"], standalone_mode=False); main(["variants", "--json"], standalone_mode=False); main(["inspect", "pissa"], standalone_mode=False)
"""
    assert not loaded_by(code) & {"torch", "numpy", "transformers", "rich", *PLUGINS}


def test_inspecting_a_file_imports_no_torch(tmp_path) -> None:
    import lora_lite as ll

    from .models import net

    ll.attach(net(), ll.LoRAConfig()).save(tmp_path / "a.safetensors")
    code = f"import lora_lite as ll\nstr(ll.inspect({str(tmp_path / 'a.safetensors')!r}))"
    assert not loaded_by(code) & {"torch", "numpy", *PLUGINS}


@pytest.mark.slow
def test_attaching_does_not_pay_for_the_listing() -> None:
    code = """
import sys, torch, lora_lite as ll
ll.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), ll.LoRAConfig(r=2))
assert not {f"lora_lite_core.{name}" for name in ("discovery.listing", "discovery.source_reading", "cli")} & set(sys.modules)
"""
    python(code)


def test_the_core_never_imports_heavy_packages() -> None:
    code = """
import torch, lora_lite as ll
for name in ll.__all__: getattr(ll, name)
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
ll.attach(model, ll.PiSSAConfig(r=2)); model(torch.zeros(1, 4)); ll.detach(model)
"""
    assert not loaded_by(code) & {"transformers", "bitsandbytes", "datasets", "peft", "accelerate", "rich"}


PLAIN = """
import sys, torch, lora_lite as ll
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
ll.attach(model, ll.LoRAConfig(r=2)).save({path!r}); ll.detach(model); ll.load(model, {path!r}); model(torch.zeros(1, 4))
import json
loaded = {{name: module.__file__ for name, module in sys.modules.items() if name.startswith("lora_lite_core")}}
print(json.dumps(loaded))
"""
# 3,457 before files and packages of strangers were read by bounded readers (750 lines of these), 4,000 before contract 3,
# 4,450 before embeddings, experts, blocks and models in shards, 5,150 before adapters could be chosen and scaled
MOST_LINES = 5400


def test_a_plain_attach_save_and_load_needs_a_small_part_of_the_core(tmp_path: Path) -> None:
    loaded = json.loads(python(PLAIN.format(path=str(tmp_path / "a.safetensors"))))
    others = ("weights", "testing", "cli", "files.peft", "discovery.listing", "discovery.source")
    assert not [name for name in loaded if name.removeprefix("lora_lite_core.").startswith(others)]
    lines = {name: len(Path(file).read_text(encoding="utf-8").splitlines()) for name, file in loaded.items()}
    assert sum(lines.values()) <= MOST_LINES, dict(sorted(lines.items(), key=lambda item: -item[1]))


def test_importing_the_core_costs_next_to_nothing() -> None:
    code = """
import sys, time
start = time.process_time()
import lora_lite_core
print(time.process_time() - start, "torch" in sys.modules)
"""
    runs = [python(code).split() for _ in range(3)]
    assert all(torch == "False" for _, torch in runs)
    assert min(float(seconds) for seconds, _ in runs) < 0.05


@pytest.mark.slow
def test_using_every_name_costs_a_small_part_of_importing_torch() -> None:
    code = """
import time
start = time.process_time()
import torch
middle = time.process_time()
import safetensors.torch, pluggy, importlib_metadata
last = time.process_time()
import lora_lite as ll
for name in ll.__all__: getattr(ll, name)
print((time.process_time() - last) / (middle - start))
"""
    assert min(float(python(code)) for _ in range(3)) < 0.1


def test_the_command_line_answers_at_once() -> None:
    code = """
import time
start = time.process_time()
from lora_lite_core.cli import main
main(["variants"], standalone_mode=False)
print(time.process_time() - start)
"""
    assert min(float(python(code).splitlines()[-1]) for _ in range(3)) < 0.5


@pytest.mark.slow
def test_names_resolve_to_one_object_through_both_packages() -> None:
    python("""
import lora_lite, lora_lite_core
names = [*lora_lite_core.__all__, *(n for n in dir(lora_lite) if n.endswith("Config")), "__version__"]
for name in names:
    first, second = getattr(lora_lite, name), getattr(lora_lite, name)
    assert first is second and first is getattr(lora_lite_core, name), name
""")


def test_no_public_name_is_a_submodule() -> None:
    import pkgutil

    modules = {module.name for module in pkgutil.iter_modules(lora_lite_core.__path__)}
    assert not modules & set(lora_lite_core.__all__)


def test_every_public_name_resolves_where_the_table_says() -> None:
    for name in lora_lite_core.__all__:
        thing = getattr(lora_lite_core, name)
        assert getattr(thing, "__module__", "lora_lite_core.").startswith(("lora_lite_core.", "pluggy")), name
