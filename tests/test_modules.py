"""train_modules: heads that are trained whole, saved with the adapter, and gone when it is gone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll

from .test_attach import snapshot


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.parts = nn.ModuleDict({"body": nn.Linear(6, 8), "head": head})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts["head"](torch.tanh(self.parts["body"](x)))


CFG = ll.LoRAConfig(r=2, train_modules=(r"head$",))
X = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


def fitted(model: nn.Module, adapter: ll.Adapter) -> torch.Tensor:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    model.train()
    for _ in range(5):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()(X)


def test_a_head_is_trained_saved_and_restored(tmp_path: Path) -> None:
    model = Model().eval()
    base, before, own = model(X), snapshot(model), dict(model.named_parameters())
    keys = set(model.state_dict())
    adapter = ll.attach(model, CFG)
    assert adapter.targets == ("parts.body",)
    assert torch.equal(model(X), base)
    assert {key for key in model.state_dict() if "lora_" not in key} == keys
    trained = fitted(model, adapter)
    assert not torch.allclose(trained, base)
    assert not torch.equal(model.parts["head"][2].weight, own["parts.head.2.weight"])
    assert int(model.parts["head"][1].num_batches_tracked) == 5
    with ll.disabled(model):
        assert torch.equal(model(X), base)
        adapter.save(tmp_path / "a.safetensors")
    assert torch.equal(model(X), trained)
    adapter.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    fresh = Model().eval()
    loaded = ll.load(fresh, tmp_path / "a.safetensors", trainable=False)
    assert torch.equal(fresh(X), trained)
    assert not any(p.requires_grad for p in fresh.parameters())
    loaded.detach()
    adapter.detach()
    for one in (model, fresh):
        assert torch.equal(one(X), base)
        assert all(p.requires_grad for p in one.parameters())
    assert snapshot(model) == before
    assert all(p is own[name] for name, p in model.named_parameters())


def test_copies_carry_both() -> None:
    model = Model().eval()
    base = model(X)
    trained = fitted(model, ll.attach(model, CFG))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), trained)
        ll.detach(twin)
        assert torch.equal(twin(X), base)
    assert torch.equal(model(X), trained)


def test_the_model_may_move_meanwhile() -> None:
    model = Model().eval()
    adapter = ll.attach(model, CFG)
    fitted(model, adapter)
    model.double()
    adapter.detach()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(X.double()), Model().eval().double()(X.double()))


def test_merge_keeps_what_was_trained() -> None:
    model = Model().eval()
    trained = fitted(model, ll.attach(model, CFG))
    with ll.merged(model):
        torch.testing.assert_close(model(X), trained)
    assert torch.equal(model(X), trained)
    ll.merge(model)
    torch.testing.assert_close(model(X), trained)
    assert not ll.adapters(model)


def test_what_is_refused(tmp_path: Path) -> None:
    model = Model()
    before = snapshot(model)
    with pytest.raises(
        ll.TargetError, match=r"train_modules: 'haed' matches no module and no parameter; did you mean 'head'\?"
    ):
        ll.attach(model, ll.LoRAConfig(r=2, train_modules=("haed",)))
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False), "mid": nn.Linear(4, 4)})
    tied["head"].weight = tied["embed"].weight
    with pytest.raises(
        ll.TargetError, match="train_modules: head.weight is also embed.weight, which would no longer be"
    ):
        ll.attach(tied, ll.LoRAConfig(r=2, exclude_names=(), train_modules=("head",)))
    assert snapshot(model) == before
    ll.attach(model, CFG)
    with pytest.raises(ll.TargetError, match="parts.head.0.weight is trained whole by adapter 'default' already"):
        ll.attach(model, CFG, name="second")
    with pytest.raises(
        ll.MergeError, match=r"the adapter trains whole modules \(parts.head.0.weight, .* servers do not take"
    ):
        ll.export_lora(model, tmp_path / "out")
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("head.0",)), name="on_the_head")
    with pytest.raises(
        ll.TargetError, match="train_modules: parts.head.0 carries an adapter; train it whole or adapt it"
    ):
        ll.attach(model, CFG)


def test_a_failed_attach_restores_the_head(registered: Any, toy: Any) -> None:
    toy.fingerprint = ll.hookimpl(lambda layer: 1 / 0)
    registered(toy, name="toy")
    model = Model()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        ll.attach(model, toy.Config(train_modules=("head",)))
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_modules_to_save_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4, num_labels=3)).eval()
    ids = torch.randint(0, 60, (4, 7))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    cfg = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"])
    theirs = peft.get_peft_model(copy.deepcopy(base), cfg).eval()
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    adapter = ll.import_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    assert "classifier.weight" in dict(adapter.named_tensors())
    ll.export_peft(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    assert torch.equal(logits(model), logits(base))
    ll.load(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)


def test_the_base_stays_frozen_while_another_adapter_is_there() -> None:
    model = Model()
    own = {key: p.detach().clone() for key, p in model.named_parameters()}
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("body",), train_modules=("head",)), name="first")
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("body",)), name="second")
    ll.detach(model, "first")
    assert [key for key, p in model.named_parameters() if p.requires_grad] == [
        "parts.body.lora_A__second",
        "parts.body.lora_B__second",
    ]
    ll.detach(model)
    assert all(torch.equal(p, own[key]) and p.requires_grad for key, p in model.named_parameters())


def test_merging_one_of_two_leaves_its_head_frozen() -> None:
    model = Model()
    fitted(model, ll.attach(model, ll.LoRAConfig(r=2, target_names=("body",), train_modules=("head",)), name="first"))
    model.parts["more"] = nn.Linear(3, 3)
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("more",)), name="second")
    ll.merge(model, "first")
    assert not model.parts["head"][0].weight.requires_grad
    ll.detach(model)
    assert model.parts["head"][0].weight.requires_grad


def test_an_adapter_on_a_head_that_another_trains_is_refused() -> None:
    model = Model()
    ll.attach(model, CFG)
    with pytest.raises(ll.TargetError, match="parts.head.0 is trained whole by adapter 'default' already"):
        ll.attach(model, ll.PiSSAConfig(r=2, target_names=("head.0",)), name="second")


@pytest.mark.parametrize("block", [ll.disabled, ll.merged])
def test_adapters_stand_still_in_a_block(block: Any, tmp_path: Path) -> None:
    model = Model()
    adapter = ll.attach(model, CFG)
    adapter.save(tmp_path / "a.safetensors")
    trained = fitted(model, adapter)
    calls = [
        lambda: ll.attach(model, ll.LoRAConfig(r=2), name="other"),
        lambda: ll.detach(model),
        lambda: ll.load(model, tmp_path / "a.safetensors", name="other"),
        lambda: ll.merge(model),
        lambda: ll.export_peft(model, tmp_path / "out"),
    ]
    with block(model):
        for call in calls:
            with pytest.raises(
                ll.ModelStateError, match=rf"not inside `with {block.__name__}\(model\)`: leave that block first"
            ):
                call()
    assert torch.equal(model(X), trained)
    with ll.merged(model), pytest.raises(ll.ModelStateError, match="not inside `with merged"), ll.disabled(model):
        pass


def test_biases_are_trained_beside_adapters_on_their_layers(tmp_path: Path) -> None:
    model = Model().eval()
    base, own = model(X).detach(), dict(model.named_parameters())
    adapter = ll.attach(model, ll.LoRAConfig(r=2, train_modules=(r"\.bias$",)))
    biases = [name for name in own if name.endswith("bias")]
    assert [name for name, _ in adapter.named_tensors() if "lora_" not in name] == biases
    assert torch.equal(model(X), base)
    trained = fitted(model, adapter).detach()
    assert all(not torch.equal(model.get_parameter(name), own[name]) for name in biases)
    assert torch.equal(model.parts["head"][1].weight, own["parts.head.1.weight"])
    adapter.save(tmp_path / "a.safetensors")
    again = Model().eval()
    for buffer, moved in zip(again.buffers(), model.buffers(), strict=True):  # of the base, moved by training mode
        buffer.copy_(moved)
    ll.load(again, tmp_path / "a.safetensors")
    assert ll.adapters(again)["default"].cfg.train_modules == tuple(
        f"^{name.replace('.', chr(92) + '.')}$" for name in sorted(biases)
    )
    torch.testing.assert_close(again(X), trained)
    with ll.disabled(again):
        assert not torch.allclose(again(X), trained)
    ll.merge(again)
    torch.testing.assert_close(again(X), trained, rtol=1e-5, atol=1e-6)
    adapter.detach()
    assert all(parameter is own[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", ["all", "lora_only"])
@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_biases_of_peft_both_ways(dora: bool, kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    base = BertModel(BertConfig(**sizes, num_attention_heads=4)).eval()
    ids = torch.randint(0, 60, (4, 7))
    cfg = peft.LoraConfig(r=2, target_modules=["query", "value"], bias=kind, use_dora=dora)
    theirs = peft.get_peft_model(copy.deepcopy(base), cfg).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(ids).last_hidden_state.detach()
    model = copy.deepcopy(base)
    adapter = ll.import_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(model(ids).last_hidden_state.detach(), expected, rtol=1e-4, atol=1e-5)
    assert sum("bias" in name for name, _ in adapter.named_tensors()) == sum(
        parameter.requires_grad and "bias" in name for name, parameter in theirs.named_parameters()
    )
    ll.export_peft(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(again(ids).last_hidden_state.detach(), expected, rtol=1e-4, atol=1e-5)


def test_single_parameters_that_peft_has_no_word_for(tmp_path: Path) -> None:
    model = Model()
    ll.attach(model, ll.LoRAConfig(r=2, train_modules=(r"head\.1\.weight$",)))
    with pytest.raises(ll.MergeError, match=r"trains parts.head.1.weight; PEFT has all biases of the model, those of"):
        ll.export_peft(model, tmp_path / "no")
    with pytest.raises(ll.MergeError, match=r"trains whole modules"):
        ll.export_lora(model, tmp_path / "no")
