"""Tensors that PEFT keeps once for all layers, and that layers share here: VeRA's projections."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

from .models import Net, token_ids
from .variants import vera

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
A, B = "base_model.vera_A", "base_model.vera_B"


@ll.hookimpl
def to_peft(params: dict[str, Tensor], cfg: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields = {"peft_type": "VERA", "r": cfg.r, "save_projection": True, "d_initial": cfg.d0}
    own = {"vera_lambda_d": cfg.d0 + params["lora_d"], "vera_lambda_b": params["lora_b"]}
    return fields, {**own, A: params["lora_A"], B: params["lora_B"]}


@ll.hookimpl
def from_peft(
    config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Linear
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if config["peft_type"] != "VERA":
        return None
    for field in ("projection_prng_key", "save_projection"):
        config.get(field)
    d0 = config["d_initial"]
    return {"r": config["r"], "d0": d0}, {
        "lora_A": tensors[A][:, : layer.in_features],
        "lora_B": tensors[B][: layer.out_features],
        "lora_d": tensors["vera_lambda_d"] - d0,
        "lora_b": tensors["vera_lambda_b"],
    }


@pytest.fixture(autouse=True)
def _variant(registered: Any) -> None:
    module = types.ModuleType("vera_with_peft")
    vars(module).update({key: value for key, value in vars(vera).items() if not key.startswith("__")})
    module.to_peft, module.from_peft = to_peft, from_peft  # type: ignore[attr-defined]
    registered(module, name="vera")


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    del model.config  # which is none of transformers'
    return model


def theirs() -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(net(), peft.VeraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model.eval()


def test_vera_of_peft_both_ways(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path / "theirs")
    expected = model(token_ids()).detach()
    ours = net()
    adapter = ll.import_peft(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)
    assert sorted(name for name, _ in adapter.named_tensors() if "." not in name) == [
        "lora_A_4x16",
        "lora_A_4x24",
        "lora_B_16x4",
        "lora_B_24x4",
    ]
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)


def test_several_tensors_where_peft_has_one(tmp_path: Path) -> None:
    model = net()
    ll.attach(model, ll.LoraLiteConfig(variant="vera", r=4, target_names=("q_proj", "down_proj")))
    with pytest.raises(ll.MergeError, match=r"PEFT keeps base_model.vera_A once for all layers, and these layers have"):
        ll.export_peft(model, tmp_path / "none")


def test_a_folder_without_them(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False)
    peft.get_peft_model(net(), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ll.AdapterFileError, match=r"'base_model.vera_A' is missing"):
        ll.import_peft(net(), tmp_path / "theirs")
