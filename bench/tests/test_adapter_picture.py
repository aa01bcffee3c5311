"""Shifts and rotations of an adapter file, drawn without its base: the numbers, the command, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lora_lite_bench.report.adapter_picture import changes_in
from lora_lite_bench.report.command import report
from lora_lite_bench.runs.model_state import spectrum
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lora_lite as ll

PNG = b"\x89PNG\r\n"


def saved(folder: Path, variant: str, **fields: Any) -> tuple[Any, Path]:
    """An adapter on two layers of other sizes and ranks, moved, in a file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 12))
    cfg = ll.LoraLiteConfig(variant=variant, **{"r": 8, "rank_pattern": {"2": 4}, **fields})
    data = [torch.randn(40, 24)] if fields.get("basis") in ("corda", "asvd") else None
    adapter = ll.attach(model, cfg, calibration_data=data)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    ll.save(model, folder / f"{variant}.safetensors")
    return adapter, folder / f"{variant}.safetensors"


def test_gains_shift_and_do_not_turn(tmp_path: Path) -> None:
    for basis in ("svd", "corda", "asvd"):
        adapter, path = saved(tmp_path, "antipasto_gain", basis=basis)
        found = changes_in(path)
        assert list(found) == ["0", "2"]
        for name, target in adapter.layers().items():
            expected = nn.functional.elu(target.params["lora_g"]).detach()
            torch.testing.assert_close(torch.tensor(found[name]["shift"]), expected, rtol=0, atol=1e-5)
            assert found[name]["angle"] == []


def test_an_ablation_shrinks_and_turns(tmp_path: Path) -> None:
    """One direction c, taken out by a half: column i of the core is S_i (e_i − c_i c / 2)."""
    adapter, path = saved(tmp_path, "antipasto_ablate", k=1)
    for target in adapter.layers().values():
        target.params["lora_a"].data.fill_(0.5)
    ll.save(adapter.model, path)
    found = changes_in(path)
    for name, target in adapter.layers().items():
        c = nn.functional.normalize(target.params["lora_C"][:, 0].detach(), dim=0)
        columns = torch.eye(len(c)) - 0.5 * torch.outer(c, c)
        torch.testing.assert_close(torch.tensor(found[name]["shift"]), columns.diagonal() - 1, rtol=0, atol=2e-5)
        cosine = columns.diagonal() / columns.norm(dim=0)
        torch.testing.assert_close(torch.tensor(found[name]["angle"]), cosine.acos(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("variant", ["antipasto", "antipasto_gain", "antipasto_ablate", "antipasto_mix", "ssvd"])
def test_a_file_says_what_the_adapter_says(variant: str, tmp_path: Path) -> None:
    adapter, path = saved(tmp_path, variant)
    here, there = dict(spectrum(adapter)), changes_in(path)
    assert here == there
    assert [len(change["shift"]) for change in there.values()] == [8, 4]
    assert any(abs(value) > 0.01 for value in there["0"]["shift"])
    assert bool(there["0"]["angle"]) is (variant != "antipasto_gain")


def test_the_command_draws_adapter_files(tmp_path: Path) -> None:
    paths = [str(saved(tmp_path, variant)[1]) for variant in ("antipasto", "antipasto_gain")]
    done = CliRunner().invoke(report, [*paths, "--png", str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    made = sorted((tmp_path / "made").iterdir())
    assert [path.name for path in made] == ["antipasto.png", "antipasto_gain.png"]
    assert all(path.read_bytes().startswith(PNG) for path in made)
    assert made[0].read_bytes() != made[1].read_bytes()


def test_into_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = saved(tmp_path, "antipasto_mix")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = CliRunner().invoke(report, [str(path)])
    assert done.exit_code == 0, done.output
    assert [one.name for one in Path().iterdir()] == ["antipasto_mix.png"]


def test_what_is_refused(tmp_path: Path) -> None:
    _, lora = saved(tmp_path, "lora")
    (tmp_path / "none.safetensors").write_bytes(b"no such thing")
    for args, message in [
        ([str(lora)], "variant 'lora' keeps no singular triplets, and there is nothing to draw"),
        ([str(tmp_path / "none.safetensors")], "is not a safetensors file"),
        ([str(lora), "--html", str(tmp_path / "p.html")], "--html and --markdown are of results"),
    ]:
        done = CliRunner().invoke(report, [*args])
        assert done.exit_code != 0
        assert message in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors", "none.safetensors"]


@pytest.mark.parametrize("change", [lambda P: P * torch.nan, lambda P: P[:0], lambda P: P[:-1], lambda P: P[0]])
def test_tensors_that_do_not_fit(change: Any, tmp_path: Path) -> None:
    _, path = saved(tmp_path, "antipasto_mix")
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file({**tensors, "0.lora_P": change(tensors["0.lora_P"]).contiguous()}, path, metadata)
    done = CliRunner().invoke(report, [str(path), "--png", str(tmp_path)])
    assert done.exit_code == 1
    assert "the tensors of 0 do not fit 'antipasto_mix'" in done.output
    assert not list(tmp_path.glob("*.png"))
