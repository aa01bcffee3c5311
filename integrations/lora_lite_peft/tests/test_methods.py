"""Every variant as a method of PEFT: the identity, training, folders, switching off, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lite_peft import LoraLiteConfig
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model

import lora_lite as ll
from tests.usual import NEEDED, OTHERS, SPREAD

VARIANTS = SPREAD


def config_of(variant: str, ids: Any, **more: Any) -> LoraLiteConfig:
    ranked = "r" in ll.get_variant(variant).Config.__dataclass_fields__
    own = {"eva": {"calibration_data": [ids]}, "trainable_tokens": {"rows": tuple(range(10))}}
    data = own.get(variant, {})
    return LoraLiteConfig(variant=variant, **({"r": 4} if ranked else {}), **data, **more)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_a_method_of_peft(variant: str, llama: Any, ids: Any, train: Any, tmp_path: Path) -> None:
    base_logits, frozen = llama()(ids).logits, {n: p.clone() for n, p in llama().named_parameters()}
    model = get_peft_model(llama(), config_of(variant, ids, task_type="CAUSAL_LM"))
    assert type(model) is PeftModelForCausalLM
    atol = ll.get_variant(variant).identity_atol
    torch.testing.assert_close(model(ids).logits, base_logits, rtol=0, atol=atol)
    train(model, ids)
    trained = model(ids).logits
    assert (trained - base_logits).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base_logits)
        assert model.get_model_status().enabled is False
    assert torch.equal(model(ids).logits, trained)

    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(again(ids).logits, trained)
    assert not [n for n, p in again.named_parameters() if p.requires_grad]
    ours = llama()
    ll.load(ours, tmp_path / "adapter_model.safetensors")
    assert torch.equal(ours(ids).logits, trained)

    for name, parameter in again.get_base_model().named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, trained, rtol=0, atol=2e-6)
    assert not ll.adapters(merged)
    assert not hasattr(merged, "peft_config")
    bare = again.unload()
    assert torch.equal(bare(ids).logits, base_logits)
    assert dict(bare.named_parameters()).keys() == frozen.keys()


def test_a_variant_of_somebody_else(shift: Any, llama: Any, ids: Any, train: Any, tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraLiteConfig(variant="shift", target_names=("q_proj",)))
    assert torch.equal(model(ids).logits, llama()(ids).logits)
    train(model, ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(ids).logits, model(ids).logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["config"]["variant"] == "shift"


def test_what_peft_says_of_it(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(llama(), LoraLiteConfig(variant="pissa", r=2, target_names=("q_proj", "v_proj")))
    model.print_trainable_parameters()
    trained = sum(p.numel() for p in ll.adapters(model.get_base_model())["default"].parameters())
    assert capsys.readouterr().out.startswith(f"trainable params: {trained:,d} || all params: ")
    status = model.get_model_status()
    assert status.peft_types == {"default": "LORA_LITE"}
    assert (status.adapter_model_type, status.num_adapter_layers) == ("LoraLiteModel", 4)
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True}
    assert status.devices == {"default": ["cpu"]}
    assert status.quantization_backend is None
    first = model.get_layer_status()[0]
    assert (first.name, first.module_type) == ("adapted.model.layers.0.self_attn.q_proj", "pissa.Linear")
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert model.targeted_module_names == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    keys = model.state_dict().keys()
    assert not [key for key in keys if "adapted" in key]


def test_a_config_read_from_a_folder(llama: Any, ids: Any, train: Any, tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraLiteConfig(ll.LoRAConfig(r=2, alpha=6), seed=3, task_type="CAUSAL_LM"))
    train(model, ids)
    model.save_pretrained(tmp_path)
    alone = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(alone, LoraLiteConfig)
    assert (alone.cfg, alone.seed) == (ll.LoRAConfig(r=2, alpha=6), 3)
    fresh = get_peft_model(llama(), alone)
    assert torch.equal(fresh(ids).logits, llama()(ids).logits)
    with_adapter = LoraLiteConfig.from_pretrained(str(tmp_path))
    assert torch.equal(get_peft_model(llama(), with_adapter)(ids).logits, model(ids).logits)
    given = PeftModel.from_pretrained(llama(), tmp_path, config=PeftConfig.from_pretrained(tmp_path))
    assert torch.equal(given(ids).logits, model(ids).logits)


def test_bfloat16_and_what_is_not_a_transformers_model(tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4)).bfloat16()

    x = torch.randn(5, 8, dtype=torch.bfloat16)
    model = get_peft_model(make(), LoraLiteConfig(variant="lora", r=2))
    assert torch.equal(model(x), make()(x))
    for parameter in ll.adapters(model.get_base_model())["default"].parameters():
        assert parameter.dtype == torch.float32
        parameter.data.normal_()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make(), tmp_path)(x), model(x))


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_methods_need(name: str, llama: Any, ids: Any, tmp_path: Path) -> None:
    """Tensors that layers share, schedules, penalties, gradients, what the model was called with: folders hold all."""
    variant = ll.get_variant(name)
    data = [{"input_ids": ids, "labels": ids}] if variant.takes_calibration else None

    def make(seed: int) -> Any:
        cfg = variant.Config(**NEEDED.get(name, {}))
        return get_peft_model(llama(), LoraLiteConfig(cfg, seed=seed, calibration_data=data))

    model = make(0)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(ids).logits, expected)
    other = make(1)
    other.load_adapter(tmp_path, "default")
    assert torch.equal(other(ids).logits, expected)
