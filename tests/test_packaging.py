"""Wheels in clean environments: what a person who runs pip gets. Needs a package index; run with `pytest -m packaging`."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/lora-lite-scale"
pytestmark = pytest.mark.packaging

# A torch that is small to install would do; the index decides which build this is.
CLEAN = {
    key: value
    for key, value in os.environ.items()
    if key not in ("VIRTUAL_ENV", "PYTHONPATH", "UV_PROJECT_ENVIRONMENT")
}


def run(*command: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=CLEAN, capture_output=True, text=True, check=False
    )
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All wheels, and the example's, built from a copy of what git tracks."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    tracked = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run("uv", "build", "--all-packages", "--wheel", "--out-dir", folder, cwd=source)
    run("uv", "build", "--wheel", "--out-dir", folder, source / "examples/lora-lite-scale", cwd=source)
    return folder


def environment(folder: Path, wheels: Path, *names: str) -> Path:
    """A fresh virtual environment with these wheels of ours and, from the index, only what they ask for."""
    run("uv", "venv", "--python", "3.11", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    files = [next(wheels.glob(f"{name}-[0-9]*.whl")) for name in names]
    run("uv", "pip", "install", "--python", python, *files, cwd=folder)
    return python


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    folder = tmp_path_factory.mktemp("core-svd-scale")
    return environment(folder, wheels, "lora_lite_core", "lora_lite_svd", "lora_lite_scale")


def test_all_wheels(wheels: Path) -> None:
    names = {path.name.split("-")[0] for path in wheels.glob("*.whl")}
    assert names == {
        "lora_lite", "lora_lite_antipasto", "lora_lite_bench", "lora_lite_core", "lora_lite_lora", "lora_lite_ortho",
        "lora_lite_peft", "lora_lite_repr", "lora_lite_scale", "lora_lite_shared", "lora_lite_sparse", "lora_lite_svd",
        "lora_lite_tensor", "lora_lite_transformers", "lora_lite_vllm", "lora_lite_weight",
    }  # fmt: skip
    contents = run("python3", "-m", "zipfile", "-l", next(wheels.glob("lora_lite_bench-*.whl")), cwd=wheels).stdout
    for part in ("base_model/model.safetensors", "base_model/README.md", "base_model/tokenizer.json", "py.typed"):
        assert part in contents
    core = run("python3", "-m", "zipfile", "-l", next(wheels.glob("lora_lite_core-*.whl")), cwd=wheels).stdout
    assert "lora_lite/__init__.py" in core
    assert "plugins/" not in core


def test_a_scaffolded_package_builds_installs_and_passes_its_tests(
    wheels: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("scaffold")
    python = environment(folder, wheels, "lora_lite_core")
    run(python, "-m", "lora_lite_core", "new", "my-gain", "--author", "Ada L.", cwd=folder)
    package = folder / "lora-lite-my-gain"
    run("uv", "build", "--wheel", "--out-dir", folder / "dist", package, cwd=folder)
    scale = next(wheels.glob("lora_lite_scale-*.whl"))
    own = next((folder / "dist").glob("*.whl"))
    run("uv", "pip", "install", "--python", python, own, scale, "pytest", cwd=folder)
    shutil.rmtree(package / "lora_lite_my_gain")  # the tests are to see what is installed
    done = run(python, "-m", "pytest", "-q", cwd=package)
    assert re.search(r"\b4\d passed", done.stdout), done.stdout
    shutil.copytree(EXAMPLE / "tests", folder / "example")
    done = run(python, "-m", "pytest", "-q", cwd=folder / "example")
    assert re.search(r"\b4\d passed", done.stdout), done.stdout
    listed = run(python, "-m", "lora_lite_core", "variants", cwd=folder).stdout
    assert re.search(r"^my_gain +lora-lite-my-gain 0\.1\.0 +ok +My gain: ", listed, flags=re.M)
    run(python, "-c", "import lora_lite as ll; print(ll.MyGainConfig(r=2))", cwd=folder)


def test_core_and_svd_alone(python: Path, tmp_path: Path) -> None:
    listed = run(python, "-m", "lora_lite_core", "variants", cwd=tmp_path).stdout
    assert re.search(r"^pissa +lora-lite-svd 0\.1\.0 +ok ", listed, flags=re.M)
    run(
        python, "-W", "error", "-c",
        "import lora_lite as ll\n"
        "assert {i.distribution for i in ll.list_variants()} == {'lora-lite-svd', 'lora-lite-scale'}\n"
        "assert 'pissa' in ll.list_variants() and 'scale' in ll.list_variants()\n"
        "assert all(i.state == 'ok' for i in ll.list_variants(check=True))\n"
        "assert ll.PiSSAConfig(r=2).r == 2\n"
        "try: ll.LoRAConfig\n"
        "except AttributeError as error: assert 'pip install lora-lite-lora' in str(error), error\n"
        "else: raise SystemExit('no error')\n",
        cwd=tmp_path,
    )  # fmt: skip
    installed = run("uv", "pip", "list", "--python", python, cwd=tmp_path).stdout
    for heavy in ("transformers", "bitsandbytes", "datasets", "peft", "rich"):
        assert f"\n{heavy} " not in installed


THIRD_PARTY = """
import torch, lora_lite as ll
info = ll.list_variants("scale")[0]
assert (info.distribution, info.version, info.state) == ("lora-lite-scale", "0.3.0", "ok"), info
torch.manual_seed(0)
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
model, x = make(), torch.randn(6, 8)
base = model(x)
adapter = ll.attach(model, ll.ScaleConfig(block=2))
assert torch.equal(model(x), base)
optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
losses = []
for _ in range(20):
    loss = model(x).square().mean()
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0]
trained = model(x)
ll.save(model, "scale.safetensors")
ll.detach(model)
assert torch.equal(model(x), base)
ll.load(model, "scale.safetensors")
assert torch.equal(model(x), trained)
fresh = make()
ll.load(fresh, "scale.safetensors")
assert torch.equal(fresh(x), trained)
"""


def core_hash(python: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(python.parents[1].glob("lib/python*/site-packages/lora_lite*/**/*.py")):
        if "lora_lite_core" in path.parts or path.parent.name == "lora_lite":
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def test_a_third_party_package(wheels: Path, tmp_path: Path) -> None:
    """Installed beside the core's wheel alone: listed, attached, trained, saved, loaded; the core did not change."""
    python = environment(tmp_path, wheels, "lora_lite_core")
    before = core_hash(python)
    run("uv", "pip", "install", "--python", python, next(wheels.glob("lora_lite_scale-*.whl")), cwd=tmp_path)
    run(python, "-c", THIRD_PARTY, cwd=tmp_path)
    assert core_hash(python) == before
    shown = run(python, "-m", "lora_lite_core", "inspect", "scale.safetensors", cwd=tmp_path).stdout
    assert "scale (lora-lite-scale 0.3.0), 2 layers" in shown
    run("uv", "pip", "uninstall", "--python", python, "lora-lite-scale", cwd=tmp_path)
    missing = run(
        python,
        "-c",
        "import torch, lora_lite as ll\nll.load(torch.nn.Sequential(torch.nn.Linear(8, 12)), 'scale.safetensors')",
        cwd=tmp_path,
        check=False,
    )
    assert "needs variant 'scale' of lora-lite-scale 0.3.0; type: pip install lora-lite-scale" in missing.stderr


BRIDGE = """
import torch
from peft import PeftModel, get_peft_model
from lora_lite_peft import LoraLiteConfig
torch.manual_seed(0)
make = lambda: (torch.manual_seed(0), torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 4)))[1]
x = torch.randn(6, 8)
model = get_peft_model(make(), LoraLiteConfig(variant="lora", r=2))
assert torch.equal(model(x), make()(x))
[p.data.normal_() for p in model.parameters() if p.requires_grad]
model.save_pretrained("adapter")
assert torch.equal(PeftModel.from_pretrained(make(), "adapter")(x), model(x))
"""


def test_the_peft_bridge_alone(wheels: Path, tmp_path: Path) -> None:
    python = environment(tmp_path, wheels, "lora_lite_core", "lora_lite_lora", "lora_lite_peft")
    run(python, "-c", BRIDGE, cwd=tmp_path)


TRAINER = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
import lora_lite as ll
from lora_lite_transformers import AdapterTrainer
make = lambda: LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
model = make()
ll.attach(model, ll.LoRAConfig(r=2))
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
arguments = TrainingArguments("run", max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
type("T", (AdapterTrainer, Trainer), {})(model, arguments, train_dataset=rows).train()
ll.load(make(), "run/checkpoint-1")
"""


def test_the_trainer_alone(wheels: Path, tmp_path: Path) -> None:
    python = environment(tmp_path, wheels, "lora_lite_core", "lora_lite_lora", "lora_lite_transformers")
    run(python, "-c", TRAINER, cwd=tmp_path)


def test_vision_models_with_convolutions() -> None:
    """diffusers and timm are too large for the development environment."""
    command = ["uv", "run", "--isolated", "--quiet", "--with", "diffusers", "--with", "timm", "python"]
    done = subprocess.run(
        [*command, "-m", "tests.vision_models"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
