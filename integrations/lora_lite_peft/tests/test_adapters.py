"""Several adapters on one model: which act, which train, and what copies and compiled models make of them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lite_peft import LoraLiteConfig
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import LlamaForCausalLM

import lora_lite as ll

LORA = {"variant": "lora", "r": 2, "target_names": ("q_proj", "v_proj")}


@pytest.fixture
def two(llama: Any, ids: Any, train: Any) -> Any:
    """A PeftModel with "default" (lora) and "gates" (ia3), both trained; and what each computes alone."""
    model = get_peft_model(llama(), LoraLiteConfig(**LORA, task_type="CAUSAL_LM"))
    train(model, ids)
    model.add_adapter("gates", LoraLiteConfig(variant="ia3", task_type="CAUSAL_LM"))
    model.set_adapter("gates")
    train(model, ids)
    model.set_adapter("default")
    return model


def trained_names(model: Any) -> set[str]:
    return {
        "gates" if name.endswith("__gates") else "default" for name, p in model.named_parameters() if p.requires_grad
    }


def test_only_what_is_set_acts_and_trains(two: Any, llama: Any, ids: Any, tmp_path: Path) -> None:
    assert (two.active_adapters, trained_names(two)) == (["default"], {"default"})
    first = two(ids).logits
    two.set_adapter("gates")
    second = two(ids).logits
    assert (two.active_adapters, trained_names(two)) == (["gates"], {"gates"})
    status = two.get_model_status()
    assert (status.active_adapters, status.enabled, status.merged_adapters) == (["gates"], True, [])
    assert status.requires_grad == {"default": False, "gates": True}
    assert status.available_adapters == ["default", "gates"]
    two.save_pretrained(tmp_path)
    for folder, name, expected in ((tmp_path, "default", first), (tmp_path / "gates", "gates", second)):
        alone = llama()
        ll.load(alone, folder / "adapter_model.safetensors", name=name)
        assert torch.equal(alone(ids).logits, expected)
    two.base_model.set_adapter(["default", "gates"])
    both = llama()
    ll.load(both, tmp_path / "adapter_model.safetensors")
    ll.load(both, tmp_path / "gates/adapter_model.safetensors", name="gates")
    assert torch.equal(two(ids).logits, both(ids).logits)
    two.set_adapter("default", inference_mode=True)
    assert torch.equal(two(ids).logits, first)
    assert trained_names(two) == set()
    two.set_requires_grad("gates")
    assert trained_names(two) == {"gates"}


def test_switching_off_leaves_flags_and_nests(two: Any, llama: Any, ids: Any) -> None:
    first, base = two(ids).logits, llama()(ids).logits
    two.set_adapter("default", inference_mode=True)
    with two.disable_adapter():
        assert torch.equal(two(ids).logits, base)
        with two.disable_adapter():
            assert torch.equal(two(ids).logits, base)
        assert torch.equal(two(ids).logits, base)
        generated = two.generate(input_ids=ids[:1], max_new_tokens=5, do_sample=False)
        two.set_adapter("gates")
        assert torch.equal(two(ids).logits, base)
        two.set_adapter("default", inference_mode=True)
    assert trained_names(two) == set()
    assert torch.equal(two(ids).logits, first)
    assert torch.equal(generated, llama().generate(input_ids=ids[:1], max_new_tokens=5, do_sample=False))


def test_deleting_and_adding(two: Any, llama: Any, ids: Any) -> None:
    two.set_adapter("gates")
    second = two(ids).logits
    two.set_adapter("default")
    with pytest.warns(UserWarning, match="adapter 'default' was active and is deleted; 'gates' is now"):
        two.delete_adapter("default")
    assert torch.equal(two(ids).logits, second)
    assert (two.active_adapters, two.active_adapter) == (["gates"], "gates")
    assert trained_names(two) == {"gates"}
    with pytest.raises(ValueError, match="Adapter default does not exist"):
        two.delete_adapter("default")
    with pytest.raises(ValueError, match="Adapter with name 'gates' already exists"):
        two.add_adapter("gates", LoraLiteConfig(**LORA))
    two.add_adapter("default", LoraLiteConfig(**LORA))
    two.set_adapter("default")
    assert torch.equal(two(ids).logits, llama()(ids).logits)
    two.delete_adapter("gates")
    two.delete_adapter("default")
    assert all(p.requires_grad for p in two.parameters())
    assert two.active_adapters == []


def test_loading_more_of_them(two: Any, llama: Any, ids: Any, train: Any, tmp_path: Path) -> None:
    two.save_pretrained(tmp_path, selected_adapters=["gates"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "gates"]
    model = PeftModel.from_pretrained(llama(), tmp_path / "gates", adapter_name="a", is_trainable=True)
    assert [n for n, p in model.named_parameters() if p.requires_grad]
    model.load_adapter(tmp_path / "gates", "b")
    model.set_adapter("b", inference_mode=True)
    two.set_adapter("gates")
    assert torch.equal(model(ids).logits, two(ids).logits)
    train(two, ids)
    two.save_pretrained(tmp_path, selected_adapters=["gates"])
    model.load_adapter(tmp_path / "gates", "b")  # into what is there
    assert torch.equal(model(ids).logits, two(ids).logits)
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        two.save_pretrained(tmp_path, selected_adapters=["style"])


def test_merging_one_of_two(two: Any, ids: Any) -> None:
    two.set_adapter("gates")
    second, flags = two(ids).logits, [p.requires_grad for p in two.parameters()]
    two.merge_adapter()  # the other one is not active
    torch.testing.assert_close(two(ids).logits, second, rtol=1e-4, atol=1e-5)
    two.unmerge_adapter()
    assert torch.equal(two(ids).logits, second)
    assert flags == [p.requires_grad for p in two.parameters()]
    two.get_base_model().model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    first_hook = next(iter(two.get_base_model().model.layers[0].self_attn.q_proj._forward_hooks))
    two.get_base_model().model.layers[0].self_attn.q_proj._forward_hooks.move_to_end(first_hook)
    with pytest.raises(ll.MergeError, match="has a hook that is not ours"):
        two.merge_and_unload(adapter_names=["default"])
    assert torch.equal(two(ids).logits, second)
    two.get_base_model().model.layers[0].self_attn.q_proj._forward_hooks.popitem(last=False)
    with pytest.raises(ll.AdapterNameError, match="no adapter is called 'style'\n  there are: default, gates"):
        two.merge_and_unload(adapter_names=["style"])
    merged = two.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, second, rtol=0, atol=2e-6)


def test_merging_for_a_while(llama: Any, ids: Any, train: Any) -> None:
    model = get_peft_model(llama(), LoraLiteConfig(**LORA))
    train(model, ids)
    trained = model(ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, trained, rtol=0, atol=2e-6)
    assert model.get_model_status().merged_adapters == ["default"]
    with pytest.raises(ll.ModelStateError, match=r"merged already; call unmerge_adapter\(\) first"):
        model.merge_adapter()
    with pytest.raises(ll.ModelStateError, match="would hold the merged weights for good"):
        copy.deepcopy(model)
    with pytest.warns(UserWarning, match="taken out of the weights before another is set"):
        model.set_adapter("default")
    assert torch.equal(model(ids).logits, trained)
    model.unmerge_adapter()
    model.merge_adapter()
    assert torch.equal(model.unload()(ids).logits, llama()(ids).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(two: Any, ids: Any, train: Any, copied: Any) -> None:
    first = two(ids).logits
    other = copied(two)
    assert torch.equal(other(ids).logits, first)
    assert torch.equal(two(ids).logits, first)
    train(other, ids)
    assert torch.equal(two(ids).logits, first)
    other.set_adapter("gates")
    two.set_adapter("gates")
    assert torch.equal(other(ids).logits, two(ids).logits)
    with pytest.warns(UserWarning, match="'default' is now"):
        other.delete_adapter("gates")
    assert list(ll.adapters(two.get_base_model())) == ["default", "gates"]


def test_two_models_in_a_process(two: Any, llama: Any, ids: Any) -> None:
    other = get_peft_model(llama(1), LoraLiteConfig(**LORA))
    with other.disable_adapter(), two.disable_adapter():
        assert torch.equal(two(ids).logits, llama()(ids).logits)
    other.add_adapter("gates", LoraLiteConfig(variant="hra", r=2))
    other.set_adapter("gates")
    assert two.active_adapters == ["default"]


def test_compiled(two: Any, llama: Any, ids: Any) -> None:
    first = two(ids).logits
    compiled = torch.compile(two, backend="eager", fullgraph=False)
    torch.testing.assert_close(compiled(ids).logits, first, rtol=0, atol=1e-6)
    with two.disable_adapter():
        torch.testing.assert_close(compiled(ids).logits, llama()(ids).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(compiled(ids).logits, first, rtol=0, atol=1e-6)
    with pytest.raises(ll.ModelStateError, match="the order is: load the base, attach, shard"):
        get_peft_model(torch.compile(llama()), LoraLiteConfig(**LORA))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(llama: Any, ids: Any, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = get_peft_model(llama(), LoraLiteConfig(**LORA, task_type="CAUSAL_LM")).train()
        for _, tensor in ll.adapters(model.get_base_model())["default"].named_tensors():
            torch.nn.init.normal_(tensor.data, generator=torch.Generator().manual_seed(1))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for with_it, without in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(with_it, without)


REFUSED = {
    "a name with a dot": (lambda m: m.add_adapter("a.b", LoraLiteConfig(**LORA)), ll.AdapterNameError, "'a.b' is not an adapter name; use letters, digits and single underscores"),
    "an adapter of PEFT's own": (lambda m: m.add_adapter("b", LoraConfig(r=2)), ValueError, "Cannot combine adapters with different peft types"),
    "rows of other adapters": (lambda m: m(torch.tensor([[1]]), adapter_names=["gates"]), ll.ModelStateError, "adapter_names= is not supported by lora-lite; use set_adapter for the whole batch"),
    "a name that is none": (lambda m: m.base_model.set_adapter(["default", "gate"]), ll.AdapterNameError, "no adapter is called 'gate'\n  there are: default, gates"),
    "weights made on meta": (lambda m: m.add_adapter("b", LoraLiteConfig(**LORA), low_cpu_mem_usage=True), ll.ModelStateError, "low_cpu_mem_usage=True: leave it out"),
    "merging two of three": (lambda m: (m.add_adapter("c", LoraLiteConfig(**LORA)), m.merge_adapter(["default", "c"])), ll.ModelStateError, "one adapter is merged, or all of them"),
    "one layer switched alone": (lambda m: next(x for x in m.modules() if hasattr(x, "adapter_layer_names")).enable_adapters(False), NotImplementedError, "call the PeftModel"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, two: Any, ids: Any) -> None:
    call, error, message = REFUSED[name]
    before = two(ids).logits
    with pytest.raises(error) as caught:
        call(two)
    assert message in str(caught.value)
    assert torch.equal(two(ids).logits, before)
    assert "a.b" not in two.peft_config


def test_beside_an_adapter_of_lora_lites_own(llama: Any, ids: Any, train: Any, tmp_path: Path) -> None:
    base = llama()
    ll.attach(base, ll.IA3Config(), name="mine")
    model = get_peft_model(base, LoraLiteConfig(**LORA))
    train(model, ids)
    model.save_pretrained(tmp_path)
    assert len(ll.inspect(tmp_path / "adapter_model.safetensors").targets) == 4
    model.unload()
    assert list(ll.adapters(base)) == ["mine"]


def test_a_folder_by_itself_names_its_base(llama: Any, ids: Any, train: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraLiteConfig(**LORA, task_type="CAUSAL_LM"))
    train(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_without_a_peft_model(llama: Any) -> None:
    model = llama()
    with pytest.raises(ValueError, match="use `get_peft_model` instead"):
        inject_adapter_in_model(LoraLiteConfig(**LORA), model)
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(llama(), LoraLiteConfig(**LORA), mixed=True)
    again = pytest.warns(UserWarning, match="Already found a `peft_config`")
    with again, pytest.raises(ll.AdapterNameError, match="an adapter called 'default' is attached already"):
        get_peft_model(get_peft_model(model, LoraLiteConfig(**LORA)).get_base_model(), LoraLiteConfig(**LORA))
    with pytest.raises(ll.ModelStateError, match="low_cpu_mem_usage=True: leave it out"):
        get_peft_model(llama(), LoraLiteConfig(**LORA), low_cpu_mem_usage=True)
