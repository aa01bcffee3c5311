"""`ll.reference_view(model)`: the same parameters, without the adapters or with them as they were."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll

from .models import net

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' own
IDS = torch.arange(8)[None]


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


def shake(model: Any, name: str = "default") -> None:
    with torch.no_grad():
        for parameter in ll.adapters(model)[name].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def config(variant: str, **fields: Any) -> Any:
    ranked = {"r": 2} if "r" in ll.get_variant(variant).Config.__dataclass_fields__ else {}
    return ll.LoraLiteConfig(variant=variant, **ranked, **fields)


def memory(model: torch.nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("variant", ["lora", "pissa", "hra", "dora", "ia3", "eva"])
def test_the_base_with_no_memory_of_its_own(variant: str) -> None:
    model, base = llama(), llama().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{"input_ids": IDS}] if variant == "eva" else None
    ll.attach(model, config(variant, train_modules=("lm_head",)), calibration_data=data)
    shake(model)
    adapted = model(IDS).logits
    view = ll.reference_view(model)
    assert torch.equal(view(IDS).logits, base(IDS).logits)
    assert not torch.allclose(adapted, base(IDS).logits)
    assert torch.equal(model(IDS).logits, adapted)
    assert list(view.state_dict()) == list(base.state_dict())
    inner = {name: one for name, one in view.named_parameters() if not name.startswith("lm_head")}
    held = dict(model.named_parameters())
    assert all(held[name] is parameter for name, parameter in inner.items())
    assert not any(parameter.requires_grad for parameter in view.parameters())
    ll.detach(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert memory(view) == memory(model)
    assert torch.equal(view(IDS).logits, base(IDS).logits)


def test_every_way_in() -> None:
    model, base = llama(), llama().requires_grad_(False)
    ll.attach(model, ll.LoRAConfig(r=2))
    shake(model)
    view = ll.reference_view(model)
    assert type(view) is type(model)
    assert view.config.to_dict() == model.config.to_dict()
    for enter in (lambda m: m.base_model, lambda m: m.model, lambda m: m.get_decoder()):
        assert torch.equal(enter(view)(IDS).last_hidden_state, enter(base)(IDS).last_hidden_state)
        assert not torch.equal(enter(view)(IDS).last_hidden_state, enter(model)(IDS).last_hidden_state)
    assert view.get_output_embeddings().weight is model.get_output_embeddings().weight
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(view.generate(IDS, **how), base.generate(IDS, **how))
    assert view.train() is view
    assert model.training is False


def test_an_adapter_as_it_is_now() -> None:
    model = llama()
    ll.attach(model, ll.PiSSAConfig(r=2, train_modules=("lm_head",)))
    ll.attach(model, ll.IA3Config(), name="gates")
    for name in ("default", "gates"):
        shake(model, name)
    both = model(IDS).logits
    with ll.disabled(model, "gates"):
        one = model(IDS).logits
    views = ll.reference_view(model, "default"), ll.reference_view(model, ["gates", "default"])
    assert [list(ll.adapters(view)) for view in views] == [["default"], ["default", "gates"]]
    shake(model)
    for view, wanted in zip(views, (one, both), strict=True):
        assert torch.equal(view(IDS).logits, wanted), "it does not follow the training"
        assert not any(parameter.requires_grad for parameter in view.parameters())
    later = model(IDS).logits
    ll.detach(views[1])
    assert torch.equal(views[1](IDS).logits, llama().requires_grad_(False)(IDS).logits)
    assert torch.equal(model(IDS).logits, later), "detached from the view alone"
    assert model.training is False
    ll.detach(model)
    assert torch.equal(views[0](IDS).logits, one)


def test_what_the_view_saves(tmp_path: Path) -> None:
    model = llama()
    ll.attach(model, ll.LoRAConfig(r=2))
    shake(model)
    start = model(IDS).logits
    view, kept = ll.reference_view(model), ll.reference_view(model, "default")
    shake(model)
    view.save_pretrained(tmp_path / "base")
    kept.save_pretrained(tmp_path / "kept")
    assert not (tmp_path / "base/adapters").exists()
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "kept").eval()
    ll.load(again, tmp_path / "kept")
    assert torch.equal(again(IDS).logits, start)


def test_it_follows_the_base_and_not_what_is_attached_later() -> None:
    model, base = llama(), llama().requires_grad_(False)
    ll.attach(model, ll.LoRAConfig(r=2))
    view = ll.reference_view(model)
    ll.attach(model, ll.LoRAConfig(r=2), name="b")
    shake(model, "b")
    assert torch.equal(view(IDS).logits, base(IDS).logits)
    model.to(torch.float64)
    assert {parameter.dtype for parameter in view.parameters()} == {torch.float64}
    shared = {name: one.data_ptr() for name, one in model.named_parameters()}
    assert all(shared[name] == one.data_ptr() for name, one in view.named_parameters())


def test_two_threads_run_base_and_adapter_at_once() -> None:
    model, base = llama(), llama().requires_grad_(False)
    ll.attach(model, ll.LoRAConfig(r=2))
    shake(model)
    view = ll.reference_view(model)
    wanted = {id(model): model(IDS).logits, id(view): base(IDS).logits}
    wrong: list[str] = []

    def run(one: Any) -> None:
        for _ in range(60):
            if not torch.equal(one(IDS).logits, wanted[id(one)]):
                wrong.append(type(one).__name__)

    threads = [threading.Thread(target=run, args=(one,)) for one in (model, view, model, view)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_training_beside_it() -> None:
    """With gradient checkpointing, which runs layers again in backward."""
    model, base = llama(), llama().requires_grad_(False)
    ll.attach(model, ll.LoRAConfig(r=2))
    view = ll.reference_view(model)
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.1))
    for _ in range(2):
        with torch.no_grad():
            reference = view(IDS).logits
        ((model(IDS).logits - reference - 1) ** 2).mean().backward()
        optimizer.step()
    assert torch.equal(view(IDS).logits, base(IDS).logits)
    assert not torch.equal(model.eval()(IDS).logits, base(IDS).logits)


def test_copies_and_compiled_ones() -> None:
    model = net()
    x = torch.arange(6)[None]
    wanted = model(x)
    ll.attach(model, ll.LoRAConfig(r=2))
    shake(model)
    view = ll.reference_view(model)
    own = copy.deepcopy(view)
    assert not memory(own) & memory(model)
    for one in (view, own, torch.compile(view, backend="eager", fullgraph=True)):
        torch.testing.assert_close(one(x), wanted)


def test_a_forward_that_was_put_on_the_instance() -> None:
    """As TRL does: the bound method holds the model's own forward in its closure."""
    import types

    model, base = llama(), llama().requires_grad_(False)
    ll.attach(model, ll.LoRAConfig(r=2))
    shake(model)
    inner = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: inner(*args, **kwargs), model)
    assert torch.equal(ll.reference_view(model)(IDS).logits, base(IDS).logits)


def test_hooks_of_the_whole_model_stay_the_models() -> None:
    """Those of a method with a schedule, and of one that has something from the base."""
    model = llama()
    AdaLora = ll.get_variant("adalora").Config
    ll.attach(model, AdaLora(r=2))
    ll.attach(model, ll.DoRAConfig(r=2), name="dora")
    counts = len(model._forward_pre_hooks), len(model._load_state_dict_post_hooks)
    assert all(counts)
    view = ll.reference_view(model)
    assert not view._forward_pre_hooks
    assert not view._load_state_dict_post_hooks
    kept = ll.reference_view(model, "default")
    ll.detach(kept)
    assert not kept._forward_pre_hooks
    assert counts == (len(model._forward_pre_hooks), len(model._load_state_dict_post_hooks))


def test_what_is_refused() -> None:
    model = llama()
    with pytest.raises(ll.AdapterNameError, match="attached: none"):
        ll.reference_view(model)
    ll.attach(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.AdapterNameError, match="no adapter is called 'defualt'; did you mean 'default'"):
        ll.reference_view(model, "defualt")
    with ll.merged(model), pytest.raises(ll.ModelStateError, match="leave that block first"):
        ll.reference_view(model)
    with ll.disabled(model):
        ll.reference_view(model)
        with pytest.raises(ll.ModelStateError, match="leave that block first"):
            ll.reference_view(model, "default")
    with torch.device("meta"):
        empty = net()
    ll.attach(empty, ll.LoRAConfig(r=2))
    with pytest.raises(ll.ModelStateError, match="has no values yet"):
        ll.reference_view(empty, "default")
