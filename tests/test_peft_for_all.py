"""What PEFT keeps for a group of layers, numbers by their order, or writes as whole numbers; and layers of which it
writes nothing. A variant that is made up reads and writes a folder of that form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite as ll

from .test_shared import bent

CONFIG = {"peft_type": "GROUPED", "target_modules": ["0", "1", "2"]}
GROUP = "base_model.grouped_s.0"


def grouped(share: str = "s") -> Any:
    def param_specs(d_out: int) -> dict[str, ll.ParamSpec]:
        return {"lora_s": ll.ParamSpec((3,), shared=share), "lora_h": ll.ParamSpec((d_out,))}

    def to_peft(params: dict[str, Tensor], name: str, sizes: dict[str, tuple[int, int]]) -> tuple[Any, Any]:
        own = {"grouped_indices": torch.full((2,), list(sizes).index(name)), "grouped_h": params["lora_h"]}
        return {"peft_type": "GROUPED"}, {GROUP: params["lora_s"], **own}

    def from_peft(tensors: dict[str, Tensor], name: str, sizes: dict[str, tuple[int, int]]) -> tuple[Any, Any]:
        number = list(sizes).index(name)
        own = tensors.get("grouped_h")
        if (indices := tensors.get("grouped_indices")) is not None:
            assert indices.tolist() == [number, number]
            assert not indices.is_floating_point()
        h = torch.full((sizes[name][1],), float(number)) if own is None else own
        s = tensors.get("grouped_s")
        return {}, {"lora_s": tensors[GROUP] if s is None else s, "lora_h": h}

    return bent(param_specs=param_specs, to_peft=to_peft, from_peft=from_peft)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5))


def folder(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def test_groups_and_orders_both_ways(registered: Any, tmp_path: Path) -> None:
    variant = grouped()
    registered(variant, name="bent")
    model, x = net(), torch.randn(2, 4)
    for parameter in ll.attach(model, variant.Config()).parameters():
        nn.init.normal_(parameter)
    expected = model(x).detach()
    ll.export_peft(model, tmp_path / "one")
    held = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert GROUP in held
    assert held["base_model.model.2.grouped_indices"].tolist() == [2, 2]
    other = net()
    ll.import_peft(other, tmp_path / "one")
    torch.testing.assert_close(other(x).detach(), expected)


def test_layers_without_a_tensor(registered: Any, tmp_path: Path) -> None:
    registered(grouped(), name="bent")
    model = net()
    ll.import_peft(model, folder(tmp_path / "a", {GROUP: torch.arange(3.0)}))
    assert model.lora_s_3.tolist() == [0, 1, 2]
    assert [float(layer.lora_h.detach()[0]) for layer in model] == [0, 1, 2]


def test_one_tensor_for_layers_that_differ_in_the_file(registered: Any, tmp_path: Path) -> None:
    registered(grouped(), name="bent")
    held = {f"base_model.model.{i}.grouped_s": torch.full((3,), float(i > 1)) for i in range(3)}
    with pytest.raises(
        ll.AdapterFileError, match=r"2: lora_s differs from that of another layer, and variant 'bent' has"
    ):
        ll.import_peft(net(), folder(tmp_path / "a", held))


def test_whole_numbers_are_indices(registered: Any, tmp_path: Path) -> None:
    registered(grouped(), name="bent")
    held = {"base_model.model.0.grouped_h": torch.ones(6, dtype=torch.int32), GROUP: torch.zeros(3)}
    with pytest.raises(ll.AdapterFileError, match=r"0.grouped_h is torch.int32; an adapter's tensors are"):
        ll.import_peft(net(), folder(tmp_path / "a", held))


def test_a_model_with_a_module_of_that_name(registered: Any, tmp_path: Path) -> None:
    """base_model.0.lora_A is then a tensor of a layer."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.base_model(x)

    model, x = Outer(), torch.randn(2, 4)
    for parameter in ll.attach(model, ll.LoRAConfig(r=2)).parameters():
        nn.init.normal_(parameter)
    ll.export_peft(model, tmp_path / "one")
    other = Outer()
    ll.import_peft(other, tmp_path / "one")
    torch.testing.assert_close(other(x).detach(), model(x).detach())
