"""Adapters of whole blocks: what a block returns, tuples, files, what cannot be done with them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll

from .models import Net, token_ids

FILE = "adapter.safetensors"
NAMES = ("houlsby", "loreft")


def config(name: str, **fields: Any) -> ll.AdapterConfig:
    return ll.LoraLiteConfig(variant=name, **{"r": 4, **fields})


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=2, **sizes)).eval()


def moved(adapter: ll.Adapter) -> ll.Adapter:
    torch.manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return adapter


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [Net, llama])
def test_a_block_is_changed_saved_and_loaded(make: Any, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = make()
    state = copy.deepcopy(base.state_dict())
    run = lambda model: getattr(model(token_ids()), "logits", model(token_ids()))  # noqa: E731
    frozen = run(base).detach()
    adapter = ll.attach(base, config(name))
    assert [path.rpartition(".")[2] for path in adapter.targets] == ["0", "1"]
    assert all("layers" in path for path in adapter.targets)
    assert torch.equal(run(base), frozen)
    y = run(moved(adapter).model)
    assert float((y - frozen).abs().max().detach()) > 1e-3
    y.square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    ll.save(base, tmp_path / FILE)
    again = make()
    again.load_state_dict(state)
    ll.load(again, tmp_path / FILE)
    torch.testing.assert_close(run(again), y)
    with ll.disabled(base):
        assert torch.equal(run(base), frozen)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(base, backend="aot_eager")(token_ids()) if make is Net else y, y)
    for call in (lambda: ll.merge(base), lambda: ll.export_lora(base, tmp_path / "lora")):
        with pytest.raises(ll.MergeError, match=f"'default' \\({name}\\) is a whole block, which has no weight"):
            call()


def test_positions_of_the_sequence() -> None:
    base = Net()
    frozen = base(token_ids()).detach()
    moved(ll.attach(base, config("loreft", first=1, last=1, target_names=(r"layers\.1$",))))
    differs = (base(token_ids()).detach() != frozen).any(-1).any(0)
    assert differs.tolist() == [True, *[False] * (len(differs) - 2), True]


def test_a_part_of_a_block_by_name() -> None:
    base = llama()
    adapter = ll.attach(base, config("houlsby", target_names=("mlp",)))
    assert adapter.targets == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert {target.d_out for target in adapter.layers().values()} == {16}


def test_other_variants_do_not_serve_blocks() -> None:
    with pytest.raises(ll.UnsupportedLayer, match=r"'norm' matches no linear layer, convolution, embedding or experts"):
        ll.attach(llama(), ll.LoraLiteConfig(variant="lora", target_names=("norm",)))
    with pytest.raises(ll.UnsupportedLayer, match=r"variant 'houlsby' serves block \(its LAYERS\)"):
        ll.attach(llama(), config("houlsby", target_names=("mlp$", "q_proj")))


def test_a_model_whose_width_is_not_known() -> None:
    base = nn.Sequential(nn.ModuleList([nn.ReLU()]))
    with pytest.raises(ll.TargetError, match=r"the width of 0.0 cannot be told: no linear layer is in it"):
        ll.attach(base, config("houlsby"))


def test_a_norm_is_as_wide_as_its_weight() -> None:
    """Also where the model says nothing of its width, or has another one: that of a head, say."""
    base = nn.Sequential(nn.ModuleDict({"q_norm": nn.LayerNorm(6), "norm": nn.RMSNorm(10)}))
    base.config = type("Config", (), {"hidden_size": 10})()  # type: ignore[assignment]
    adapter = ll.attach(base, config("houlsby", target_names=("norm",)))
    assert {name: target.d_out for name, target in adapter.layers().items()} == {"0.q_norm": 6, "0.norm": 10}
    del base.config
    ll.detach(base)
    assert len(ll.attach(base, config("houlsby", target_names=("norm",))).targets) == 2


@ll.hookimpl
def norm_from_peft(
    config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if config["peft_type"] != "OF_NORMS":
        return None
    return {}, {"lora_h": tensors["lora_h"]}


def test_a_folder_of_norms(toy: Any, registered: Any, tmp_path: Path) -> None:
    """PEFT adapts norms, too; what is no layer and no norm is none of its places."""

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        fields = {"peft_type": "OF_NORMS", "target_modules": [name.rpartition(".")[2]]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
        held = {f"base_model.model.{name}.lora_h": torch.ones(16)}
        save_file(held, tmp_path / name / "adapter_model.safetensors")
        return tmp_path / name

    toy.LAYERS, toy.from_peft = ("block",), norm_from_peft
    registered(toy, name="toy")
    base = llama()
    adapter = ll.import_peft(base, folder("model.norm"))
    assert {name: target.d_out for name, target in adapter.layers().items()} == {"model.norm": 16}
    with pytest.raises(ll.AdapterFileError, match="model.layers.0.lora_h belongs to no layer of this LlamaForCausalLM"):
        ll.import_peft(llama(), folder("model.layers.0"))


def test_wrong_layers_constant(toy: Any) -> None:
    toy.LAYERS = ("convolutions",)
    with pytest.raises(ll.BrokenPlugin, match=r"LAYERS is \('convolutions',\); give a tuple of the kinds"):
        ll.register(toy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.attach(Net(), config("houlsby"))
