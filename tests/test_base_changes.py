"""A base that changes under an adapter: weights loaded or written, layers replaced, moved away, flags turned."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_lite as ll

from .models import net, token_ids, train

MADE_OF_THE_BASE = [
    ll.PiSSAConfig(r=4),
    ll.LoRAXSConfig(r=4),
    ll.SSVDConfig(),
    ll.DoRAConfig(r=4),
    ll.DeLoRAConfig(r=4),
]
each = pytest.mark.parametrize("cfg", MADE_OF_THE_BASE, ids=lambda cfg: cfg.variant)


def load_base(model: nn.Module, source: nn.Module) -> None:
    model.load_state_dict(source.state_dict(), strict=False)


@each
def test_loading_another_base_under_an_adapter_is_noticed(cfg: ll.AdapterConfig) -> None:
    model = net()
    ll.attach(model, cfg)
    with pytest.warns(
        UserWarning, match=r"made on other weights of 10 layers .* adapters\(model\)\['default'\].refresh"
    ):
        load_base(model, net(seed=5))


@each
def test_loading_the_same_base_again_is_not(cfg: ll.AdapterConfig) -> None:
    model = net()
    train(model, ll.attach(model, cfg))
    load_base(model, net())
    model.load_state_dict(model.state_dict())


def test_loading_through_an_enclosing_model_is_noticed() -> None:
    model = net()
    ll.attach(model, ll.DoRAConfig(r=4))
    outer = nn.Sequential(model)
    with pytest.warns(UserWarning, match="refresh"):
        outer.load_state_dict(nn.Sequential(net(seed=5)).state_dict(), strict=False)


@each
def test_writing_a_weight_in_place_is_noticed_by_save(cfg: ll.AdapterConfig, tmp_path: Path) -> None:
    model = net()
    adapter = ll.attach(model, cfg)
    with torch.no_grad():
        model.layers[0].up_proj.weight.mul_(2)
    with pytest.warns(UserWarning, match=r"other weights of 1 layer \(layers.0.up_proj\)"):
        adapter.save(tmp_path / "a.safetensors")


@pytest.mark.parametrize("cfg", [ll.DoRAConfig(r=4), ll.DeLoRAConfig(r=4)], ids=lambda cfg: cfg.variant)
def test_refresh_takes_the_norms_again(cfg: ll.AdapterConfig) -> None:
    model, other = net(), net(seed=5)
    adapter = ll.attach(model, cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_base(model, other)
    assert list(adapter.refresh()) == list(adapter.targets)
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()), other(token_ids()), rtol=1e-5, atol=1e-5)
    assert list(adapter.refresh()) == []


@pytest.mark.parametrize(
    "cfg", [ll.PiSSAConfig(r=4), ll.LoRAXSConfig(r=4), ll.SSVDConfig()], ids=lambda cfg: cfg.variant
)
def test_refresh_refuses_a_base_that_the_frozen_tensors_do_not_fit(cfg: ll.AdapterConfig) -> None:
    model = net()
    adapter = ll.attach(model, cfg)
    with pytest.warns(UserWarning, match="refresh"):
        load_base(model, net(seed=5))
    with pytest.raises(ll.BaseMismatch, match="adapter 'default' was made on another base model"):
        adapter.refresh()
    with pytest.warns(UserWarning, match="was made on another base model"):
        adapter.refresh(on_base_mismatch="warn")
    adapter.refresh(), "now it is the base that is remembered"
    with pytest.raises(ll.ConfigError, match="on_base_mismatch='no'; give 'error', 'warn' or 'ignore'"):
        adapter.refresh(on_base_mismatch="no")  # type: ignore[arg-type]


def test_loading_weights_inside_merged_is_refused() -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(r=2))
    with ll.merged(model), pytest.raises(ll.ModelStateError, match="load_state_dict inside `with merged"):
        load_base(model, net(seed=5))
    load_base(model, net())


def test_nothing_of_the_watch_stays_after_detach() -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(r=2))
    ll.attach(model, ll.LoRAConfig(r=2), name="b")
    ll.detach(model)
    assert not model._load_state_dict_pre_hooks
    assert not model._load_state_dict_post_hooks


# --- layers that are replaced ------------------------------------------------------------------------------------


def replaced() -> tuple[nn.Module, ll.Adapter]:
    model = net()
    adapter = ll.attach(model, ll.LoRAConfig(r=2))
    model.layers[0].up_proj = nn.Linear(16, 24)
    del model.layers[1].down_proj
    return model, adapter


def test_an_adapter_whose_layers_were_replaced_says_so(tmp_path: Path) -> None:
    model, adapter = replaced()
    assert "10 layers, 2 of them replaced since" in repr(adapter)
    for use in (
        lambda: adapter.save(tmp_path / "a.safetensors"),
        lambda: list(adapter.parameters()),
        lambda: adapter.layers(),
        lambda: adapter.refresh(),
        lambda: ll.merge(model),
        lambda: ll.export_lora(model, tmp_path / "x"),
        lambda: ll.export_peft(model, tmp_path / "x"),
        lambda: ll.param_groups(model, lr=1e-3),
    ):
        with pytest.raises(
            ll.ModelStateError, match=r"not whole any more: layers.0.up_proj, layers.1.down_proj was removed"
        ):
            use()
    assert not list(tmp_path.iterdir())


def test_it_can_still_be_switched_off_and_taken_off() -> None:
    model, _ = replaced()
    with ll.disabled(model):
        pass
    ll.detach(model)
    assert not any(name.rpartition(".")[2].startswith("lora_") for name in model.state_dict())
    assert not ll.adapters(model)


def test_a_head_that_was_trained_whole_and_replaced(tmp_path: Path) -> None:
    model = net()
    adapter = ll.attach(model, ll.LoRAConfig(r=2, train_modules="lm_head"))
    model.lm_head = nn.Identity()
    with pytest.raises(ll.ModelStateError, match=r"lm_head.weight, trained whole by an adapter, was removed"):
        adapter.save(tmp_path / "a.safetensors")
    ll.detach(model)


def test_weights_that_are_moved_away_are_refused_in_forward() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = net()
    ll.attach(model, ll.LoRAConfig(r=2))
    model = accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ll.ModelStateError, match="were moved to the meta device"):
        model(token_ids())


# --- flags -------------------------------------------------------------------------------------------------------


def test_a_second_adapter_leaves_what_was_turned_on_again() -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(r=2))
    model.embed_tokens.weight.requires_grad_(True)
    ll.attach(model, ll.HRAConfig(r=2), name="b")
    assert model.embed_tokens.weight.requires_grad
    assert not model.layers[0].up_proj.weight.requires_grad


def test_the_base_of_a_trained_head_collects_no_gradient_inside_disabled() -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(r=2, train_modules="lm_head"))
    with ll.disabled(model):
        assert not model.lm_head.weight.requires_grad
        assert not model(token_ids()).requires_grad
    assert model.lm_head.weight.requires_grad
    ll.detach(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_prepared_model_takes_no_new_parameters(tmp_path: Path) -> None:
    model = net()
    adapter = ll.attach(model, ll.LoRAConfig(r=2))
    adapter.save(tmp_path / "a.safetensors")
    model._is_accelerate_prepared = True
    for use in (
        lambda: ll.attach(model, ll.LoRAConfig(r=2), name="b"),
        lambda: ll.load(model, tmp_path / "a.safetensors", name="b"),
    ):
        with pytest.raises(ll.ModelStateError, match=r"went through accelerator.prepare"):
            use()
    ll.load(model, tmp_path / "a.safetensors", name="b", trainable=False)
    ll.merge(model)


def test_a_model_of_peft_is_refused_whatever_the_targets() -> None:
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), net())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ll.UnsupportedLayer, match="is wrapped by the peft package"):
        ll.attach(model, ll.LoRAConfig(target_names="up_proj"))
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


# --- copies ------------------------------------------------------------------------------------------------------


def test_a_copy_made_inside_disabled_runs_its_adapters() -> None:
    model = net()
    train(model, ll.attach(model, ll.LoRAConfig(r=2)))
    expected = model(token_ids()).detach()
    with ll.disabled(model):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(token_ids()).detach(), expected)
    ll.attach(twin, ll.LoRAConfig(r=2), name="b")
    ll.detach(twin)
    assert torch.equal(twin(token_ids()), net()(token_ids()))


def test_copies_that_would_be_wrong_are_refused() -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(r=2, train_modules="lm_head"))
    with (
        ll.disabled(model),
        pytest.raises(
            ll.ModelStateError, match="would keep the wrong lm_head.weight in its place, which adapter 'default'"
        ),
    ):
        copy.deepcopy(model)
    with ll.merged(model):
        for part in (model, model.layers[0]):
            with pytest.raises(ll.ModelStateError, match="would hold the merged weights for good"):
                copy.deepcopy(part)
    copy.deepcopy(model)
