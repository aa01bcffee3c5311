"""The command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import lora_lite as ll
from lora_lite_core.cli import commands as cli
from lora_lite_core.discovery.entry_points import Entry

from .models import net


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_variants() -> None:
    code, output = call("variants")
    assert code == 0
    assert output.strip() == repr(ll.list_variants())
    assert call("variants", "ia3*")[1].splitlines()[-1].startswith("ia3_ff   lora-lite-ortho")


def test_variants_json_and_check() -> None:
    code, output = call("variants", "--json", "--check")
    assert code == 0
    rows = json.loads(output)
    assert [row["name"] for row in rows] == [info.name for info in ll.list_variants()]
    assert {"name", "distribution", "version", "summary", "state"} <= set(rows[0])


def test_check_fails_when_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LITE_BLOCK", "lora")
    assert call("variants")[0] == 0
    code, output = call("variants", "--check")
    assert code == 1
    assert "lora: LORA_LITE_BLOCK=lora" in output


def test_inspect_variant() -> None:
    code, output = call("inspect", "pissa")
    assert code == 0
    assert "Meng, Wang, Zhang: PiSSA, 2024 (NeurIPS), arXiv:2404.02948." in output
    assert "hooks: param_specs, init, forward, fingerprint" in output
    assert "    r = 8\n    rank_pattern = {}\n    alpha = None" in output
    assert json.loads(call("inspect", "lora", "--json")[1])["fields"]["rslora"] == "False"


def test_inspect_file(tmp_path: Path) -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(r=2, target_names="up_proj")).save(tmp_path / "a.safetensors")
    code, output = call("inspect", str(tmp_path / "a.safetensors"))
    assert code == 0
    assert "lora (lora-lite-lora 0.1.0), 2 layers, 4 tensors, 160 numbers" in output
    assert "layers.0.up_proj  16 → 24  dense  no          –           lora_A[2, 16]:F32 lora_B[24, 2]:F32" in output
    assert json.loads(call("inspect", str(tmp_path / "a.safetensors"), "--json")[1])["variant"] == "lora"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("varants",),
            "no command is called 'varants'; did you mean 'variants'?\n  commands: bench, check, export, inspect, new, report, speed, variants",
        ),
        (("inspect", "lor"), "'lor' is neither a file nor an installed variant; did you mean 'lora'?"),
        (("inspect", "none.safetensors"), "none.safetensors cannot be read: No such file"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    code, output = call(*arguments)
    assert code != 0
    assert message in output


def test_commands_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def hello() -> None:
        """Greets."""
        click.echo("hello")

    class Fine(Entry):
        def load(self) -> Any:
            return hello

    entries = [Fine("hello", "x:y"), Entry("sick", "surely_not_there:command"), Entry("odd", "json:dumps")]
    monkeypatch.setattr(cli, "_installed", lambda: entries)
    assert call("hello") == (0, "hello\n")
    assert "Greets." in call("--help")[1]
    code, output = call("sick")
    assert code == 1
    assert "command 'sick' of surely_not_there:command cannot be imported: ModuleNotFoundError" in output
    assert "(broken: cannot be imported)" in call("--help")[1]
    assert "json:dumps is not a click command" in call("odd")[1]


def test_version() -> None:
    assert call("--version")[1] == f"lora-lite, version {ll.__version__}\n"


def test_check_prints_a_table_and_how_to_mend() -> None:
    code, output = call("check", "ia3", "--only", "quiet", "--only", "config_survives_json")
    assert code == 0, output
    assert re.search(r"^quiet +passed +\d+\.\d s$", output, flags=re.M)
    assert "ia3: 2 of 2 promises kept" in output
    code, output = call("check", "dora", "--only", "gradients", "--set", "r=2")
    assert code == 1
    assert "'dora' breaks a promise: In float64 the gradients" in output
    assert "to mend: use differentiable operations" in output
    assert call("check", "dora", "--only", "gradients", "--expect", "gradients")[0] == 0


def test_check_as_json_and_its_mistakes() -> None:
    (result,) = json.loads(call("check", "road", "--only", "quiet", "--json", "--set", "mode=2")[1])
    assert (result["name"], result["outcome"], result["message"]) == ("quiet", "passed", "")
    assert "no check is called 'quite'; did you mean 'quiet'?" in call("check", "road", "--only", "quite")[1]
    assert "RoAdConfig(mode=3): the modes are 1, 2 and 4" in call("check", "road", "--set", "mode=3")[1]
    assert "'mode' is not FIELD=VALUE" in call("check", "road", "--set", "mode")[1]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_export(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from .test_export import llama, logits, moved

    base = llama()
    base.save_pretrained(tmp_path / "base")
    adapter = moved(base, ll.HRAConfig(r=4))
    expected = logits(base)
    adapter.save(tmp_path / "a.safetensors")
    line = ["export", str(tmp_path / "a.safetensors"), "--base", str(tmp_path / "base"), "--to"]
    done = CliRunner().invoke(cli.main, [*line, str(tmp_path / "lora")])
    assert done.exit_code == 0, done.output
    assert "<LoRAExport: rank 4, 14 layers in " in done.output
    assert CliRunner().invoke(cli.main, [*line, str(tmp_path / "hra"), "--own-form"]).exit_code == 0
    for folder in ("lora", "hra"):
        opened = peft.PeftModel.from_pretrained(llama(), tmp_path / folder).eval()
        torch.testing.assert_close(logits(opened), expected, rtol=1e-4, atol=2e-5)
    both = CliRunner().invoke(cli.main, [*line, str(tmp_path / "x"), "--own-form", "--rank", "2"])
    assert "--rank, --tol, --dtype, --served, --check and --verify are for a LoRA, not --own-form" in both.output
    wrong = CliRunner().invoke(cli.main, [line[0], line[1], "--base", str(tmp_path), "--to", str(tmp_path / "x")])
    assert wrong.exit_code == 1
    assert "cannot be loaded by transformers" in wrong.output


def test_check_with_a_field_that_does_not_fit(registered: Any, toy: Any) -> None:
    done = CliRunner().invoke(cli.main, ["check", "lora", "--set", "r=abc"])
    assert done.output == "Error: LoRAConfig(r='abc'): a rank is a whole number of at least 1\n"

    class Config(ll.AdapterConfig):
        variant = "toy"

        def __post_init__(self) -> None:
            raise TypeError("share is a number")

    toy.Config = Config
    registered(toy, name="toy")
    done = CliRunner().invoke(cli.main, ["check", "toy", "--set", "layers=1"])
    assert done.exit_code == 1
    assert done.output == "Error: Config(layers=1): share is a number\n"


def test_a_file_is_enough(tmp_path: Path) -> None:
    """It is run, and the command says so."""
    path = tmp_path / "mine.py"
    path.write_text((Path(__file__).parent / "variants/blob.py").read_text().replace('"blob"', '"mine"'))
    try:
        result = CliRunner().invoke(cli.main, ["check", str(path), "--only", "identity_at_start"])
        assert result.exit_code == 0, result.output
        assert f"mine: {path} is run" in result.output
        assert "mine: 1 of 1 promises kept" in result.output
        assert ll.get_variant("mine").bench == {"lr": 1e-2}
    finally:
        ll.unregister("mine")
    for text, message in (("1/0", "cannot be run: ZeroDivisionError"), (None, "is no file of a Python module")):
        other = tmp_path / "other.py"
        other.write_text(text) if text else other.unlink()
        result = CliRunner().invoke(cli.main, ["check", str(other)])
        assert result.exit_code == 1
        assert message in result.output


def test_no_command_is_cut_off_in_the_list() -> None:
    """In the width of a terminal each says what it does to the end of the sentence."""
    with click.Context(cli.main, info_name="lora-lite", max_content_width=80, terminal_width=80) as context:
        listed = cli.main.get_help(context).partition("Commands:\n")[2]
    assert "..." not in listed, listed
