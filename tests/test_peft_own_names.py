"""What other methods' folders have and LoRA's have not: `alpha` with patterns of its own, and integer tensors, and fields
that may be null."""

from __future__ import annotations

import json
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite as ll


@dataclass(frozen=True, kw_only=True)
class PickedConfig(ll.LowRankConfig):
    variant = "picked"


@pytest.fixture(autouse=True)
def _variant(registered: Any) -> None:
    """r outputs that are shifted, by alpha / r times what is trained."""

    @ll.hookimpl
    def param_specs(d_out: int, cfg: PickedConfig) -> dict[str, ll.ParamSpec]:
        def choose(tensor: Tensor, generator: torch.Generator) -> None:
            tensor.copy_(torch.randperm(d_out, generator=generator)[: cfg.r])

        which = ll.ParamSpec((cfg.r,), choose, trainable=False, dtype=torch.int64)
        return {"lora_which": which, "lora_shift": ll.ParamSpec((cfg.r,))}

    @ll.hookimpl
    def forward(y: Tensor, params: dict[str, Tensor], cfg: PickedConfig) -> Tensor:
        shift = (cfg.scale * params["lora_shift"]).to(y.dtype)
        return y + y.new_zeros(y.shape[-1]).index_add(0, params["lora_which"], shift)

    @ll.hookimpl
    def to_peft(params: dict[str, Tensor], cfg: PickedConfig) -> Any:
        fields = {
            "peft_type": "PICKED",
            "r": cfg.r,
            "alpha": cfg.scale * cfg.r,
            "rank_pattern": {},
            "alpha_pattern": {},
        }
        return fields, {"which_indices": params["lora_which"].int(), "shift": params["lora_shift"]}

    @ll.hookimpl
    def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
        if config["peft_type"] != "PICKED":
            return None
        values = {"lora_which": tensors["which_indices"].long(), "lora_shift": tensors["shift"]}
        return {"r": config["r"], "alpha": config["alpha"]}, values

    made = types.SimpleNamespace(Config=PickedConfig, param_specs=param_specs, forward=forward, __name__="picked")
    made.to_peft, made.from_peft = to_peft, from_peft
    registered(made, name="picked")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4))


def written(folder: Path) -> tuple[nn.Module, Tensor]:
    model = net()
    adapter = ll.attach(model, PickedConfig(r=2, alpha=4, alpha_pattern={"^1$": 3}, rank_pattern={"^2$": 1}))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    ll.export_peft(model, folder)
    return model, torch.randn(5, 6)


def test_alpha_by_pattern_both_ways(tmp_path: Path) -> None:
    model, x = written(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert (config["r"], config["alpha"]) == (2, 4.0)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"^2": 1}, {"^1": 3.0})
    other = net()
    adapter = ll.import_peft(other, tmp_path / "folder")
    assert [(t.cfg.r, t.cfg.alpha) for t in adapter.layers().values()] == [(2, 4.0), (2, 3.0), (1, 4.0)]  # type: ignore[attr-defined]
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(("key", "dtype"), [("which_indices", torch.uint8), ("shift", torch.int64)])
def test_integers_are_indices_alone(tmp_path: Path, key: str, dtype: torch.dtype) -> None:
    written(tmp_path / "folder")
    path = tmp_path / "folder" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = f"base_model.model.0.{key}"
    save_file({**tensors, name: tensors[name].to(dtype)}, path)
    with pytest.raises(ll.AdapterFileError, match=f"{key} is {dtype}; an adapter's tensors are float64"):
        ll.import_peft(net(), tmp_path / "folder")


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_null_where_a_lora_is_optional(tmp_path: Path, field: str) -> None:
    written(tmp_path / "folder")
    path = tmp_path / "folder" / "adapter_config.json"
    config = json.loads(path.read_text())
    for kind in ("PICKED", "SUPERTUNING"):
        path.write_text(json.dumps({**config, "peft_type": kind, field: None}))
        with pytest.raises(ll.AdapterFileError) as caught:
            ll.import_peft(net(), tmp_path / "folder")
        assert (f"{field}=None in adapter_config.json: it is a" in str(caught.value)) == (kind == "PICKED")
