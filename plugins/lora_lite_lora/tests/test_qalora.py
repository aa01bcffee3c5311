"""QA-LoRA against the dense matrix, and against what the peft package computes on its GPTQ layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from tests.oracles import D_IN, D_OUT, assert_same, filled

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


class Packed(nn.Module):
    """A linear layer that is none of torch's, in the place of a quantised one."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = D_IN, D_OUT
        self.weight = nn.Parameter(torch.randn(D_OUT, D_IN) / 5, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def packed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Packed())


@pytest.mark.parametrize("group_size", [1, 4, D_IN])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_formula(group_size: int, alpha: float | None) -> None:
    layer, x = filled(ll.LoraLiteConfig(variant="qalora", r=4, group_size=group_size, alpha=alpha))
    A, B = (getattr(layer, name).detach().clone().requires_grad_() for name in ("lora_A", "lora_B"))
    spread = torch.kron(torch.eye(D_IN // group_size).double(), torch.ones(1, group_size).double())
    change = (alpha or 4) / 4 * B @ A @ spread
    assert_same(layer, x, F.linear(x, layer.weight + change, layer.bias), {"lora_A": A, "lora_B": B}, 1e-10)


def test_a_group_is_changed_by_one_number_a_row() -> None:
    """What a zero point of the group can take up."""
    layer, _ = filled(ll.LoraLiteConfig(variant="qalora", r=4, group_size=6))
    change = (layer(torch.eye(D_IN).double()) - F.linear(torch.eye(D_IN).double(), layer.weight, layer.bias)).T
    groups = change.unflatten(1, (-1, 6))
    torch.testing.assert_close(groups, groups[..., :1].expand_as(groups))


def theirs(cfg: Any) -> Any:
    """PEFT's layer for GPTQ around a layer, without GPTQ."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    torch.manual_seed(3)
    made = GPTQLoraLinear(packed()[0], "default", config=cfg, r=4, lora_alpha=6)
    for name in ("lora_A", "lora_B"):
        nn.init.normal_(getattr(made, name)["default"].weight)
    return made.eval()


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_folders_both_ways(rslora: bool, tmp_path: Path) -> None:
    import peft

    fields: dict[str, Any] = {"use_qalora": True, "qalora_group_size": 4, "use_rslora": rslora}
    cfg = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **fields)
    other = theirs(cfg)
    names = {"lora_A": other.lora_A["default"].weight, "lora_B": other.lora_B["default"].weight}
    assert names["lora_A"].shape == (4, D_IN // 4)
    cfg.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.0.{name}.weight": tensor.detach() for name, tensor in names.items()}, file)
    model = packed()
    adapter = ll.import_peft(model, tmp_path)
    (target,) = adapter.layers().values()
    assert target.variant.name == "qalora"
    x = torch.randn(3, 5, D_IN)
    got, expected = model(x), other(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    direction = torch.randn_like(got)
    ours = torch.autograd.grad(got, [target.params["lora_A"], target.params["lora_B"]], direction)
    gradients = torch.autograd.grad(expected, [*names.values()], direction)
    torch.testing.assert_close(ours[0] * (D_IN / 4) / 4, gradients[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], gradients[1], rtol=1e-4, atol=1e-4)
    ll.export_peft(model, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / file.name)
    for name, tensor in names.items():
        torch.testing.assert_close(written[f"base_model.model.0.{name}.weight"], tensor.detach())
    found = json.loads((tmp_path / "ours/adapter_config.json").read_text(encoding="utf-8"))
    assert found["use_qalora"]
    assert (found["qalora_group_size"], found["r"], found["lora_alpha"]) == (4, 4, 12 if rslora else 6)


def test_peft_has_it_for_gptq_alone(tmp_path: Path) -> None:
    """On an nn.Linear it makes a plain LoRA under the name of QA-LoRA."""
    import peft

    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    cfg = peft.LoraConfig(r=4, target_modules=["0"], use_qalora=True, qalora_group_size=4)
    peft.get_peft_model(nn.Sequential(nn.Linear(D_IN, D_OUT)), cfg).save_pretrained(tmp_path / "theirs")
    assert ll.import_peft(model, tmp_path / "theirs").record.variant.name == "lora"
    ll.detach(model)
    ll.attach(model, ll.LoraLiteConfig(variant="qalora", r=4, group_size=4))
    with pytest.raises(ll.MergeError, match="PEFT has QA-LoRA for GPTQ layers alone"):
        ll.export_peft(model, tmp_path / "ours")


def test_refusals() -> None:
    with pytest.raises(
        ll.TargetError, match=r"group_size=16\) does not divide d_in=24; these do: \[1, 2, 3, 4, 6, 8, 12"
    ):
        ll.attach(nn.Sequential(nn.Linear(24, 16)), ll.LoraLiteConfig(variant="qalora", r=4))
    with pytest.raises(ll.ConfigError, match=r"QALoRAConfig\(group_size=0\): it is a whole number of at least 1"):
        ll.LoraLiteConfig(variant="qalora", group_size=0)
