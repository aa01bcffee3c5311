"""attach, detach, disabled, adapters: what the core promises whatever the variant."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

from .models import HIDDEN, net, snapshot, token_ids, train, weights_hash

LORA = {"r": 2, "target_names": ("q_proj", "down_proj")}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(token_ids())


def test_handle() -> None:
    model = net()
    adapter = ll.attach(model, ll.LoRAConfig(**LORA))
    total = sum(p.numel() for p in model.parameters())
    assert repr(adapter) == f"<Adapter 'default': lora, r=2, 4 layers, 288 trainable parameters ({288 / total:.2%})>"
    assert adapter.targets == tuple(f"layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "down_proj"))
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 2 * (32 + 40)
    adapter.detach()
    assert repr(adapter) == "<Adapter 'default': detached>"


def test_tensors_are_parameters_of_the_layer() -> None:
    model = net()
    before = set(model.state_dict())
    ll.attach(model, ll.LoRAConfig(**LORA))
    ll.attach(model, ll.LoRAConfig(**LORA), name="style")
    added = set(model.state_dict()) - before
    assert added == {
        f"layers.{i}.{layer}.lora_{which}{suffix}"
        for i in range(2) for layer in ("self_attn.q_proj", "down_proj") for which in "AB" for suffix in ("", "__style")
    }  # fmt: skip


def test_detach_leaves_no_trace() -> None:
    model = net()
    model.layers[0].up_proj.weight.requires_grad_(False)  # was off before: must stay off
    before = snapshot(model)
    adapter = ll.attach(model, ll.LoRAConfig(**LORA))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n in dict(model.named_parameters()) if "lora_" in n
    ]
    train(model, adapter)
    ll.detach(model)
    assert snapshot(model) == before


def test_only_the_last_detach_unfreezes_and_only_what_is_still_off() -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(**LORA))
    ll.attach(model, ll.IA3Config(), name="gates")
    assert model.layers[0].self_attn.q_proj.lora_A.requires_grad, "an adapter that is there keeps its flags"
    ll.detach(model, "default")
    assert not model.lm_head.weight.requires_grad
    ll.detach(model, "gates")
    assert all(p.requires_grad for p in model.parameters())


def test_freezing_leaves_a_frozen_adapter_frozen() -> None:
    model = net()
    first = ll.attach(model, ll.LoRAConfig(**LORA))
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    ll.attach(model, ll.IA3Config(), name="gates")
    assert list(first.parameters()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_adapters_add_up_in_attach_order(dtype: torch.dtype) -> None:
    model = net(dtype)
    base = outputs(model)
    first = ll.attach(model, ll.IA3FFConfig(target_names="down_proj"))
    second = ll.attach(model, ll.LoRAConfig(r=2), name="style")
    assert torch.equal(outputs(model), base)
    train(model, first)
    train(model, second)
    layer, x = model.layers[0].down_proj, torch.randn(4, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    gated = torch.addcmul(x, x, layer.lora_g.to(dtype))
    expected = nn.functional.linear(gated, layer.weight, layer.bias)
    delta = gated @ layer.lora_A__style.to(dtype).T @ layer.lora_B__style.to(dtype).T
    torch.testing.assert_close(layer(x), expected + delta)
    assert len(layer._forward_hooks) == 1
    assert len(layer._forward_pre_hooks) == 1
    ll.detach(model, "style")
    torch.testing.assert_close(layer(x), expected)
    assert len(layer._forward_hooks) == 0


def test_disabled() -> None:
    model = net()
    base = outputs(model)
    train(model, ll.attach(model, ll.LoRAConfig(**LORA)))
    train(model, ll.attach(model, ll.IA3Config(), name="gates"))
    both = outputs(model)
    with ll.disabled(model):
        assert torch.equal(outputs(model), base)
        with ll.disabled(model, "gates"):  # nested: the inner one must not switch anything on
            assert torch.equal(outputs(model), base)
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(model), both)
    with ll.disabled(model, "gates"):
        only_lora = outputs(model)
    assert not torch.equal(only_lora, both)
    ll.detach(model, "gates")
    assert torch.equal(outputs(model), only_lora)
    with pytest.raises(RuntimeError, match="boom"), ll.disabled(model):
        raise RuntimeError("boom")
    assert torch.equal(outputs(model), only_lora)


@pytest.mark.parametrize("call", ["keyword", "extra", "empty", "vector", "4d", "strided"])
def test_every_way_to_call_a_layer(call: str) -> None:
    class Extra(nn.Linear):
        def forward(self, input: Tensor, factor: float = 1.0) -> Tensor:
            return super().forward(input) * factor

    model = nn.Sequential(Extra(HIDDEN, 8))
    layer = model[0]
    for number, cfg in enumerate((ll.IA3FFConfig(), ll.LoRAConfig(r=2))):
        for tensor in (t for _, t in ll.attach(model, cfg, name=f"a{number}").named_tensors()):
            nn.init.normal_(tensor)
    x = torch.randn(3, HIDDEN)

    def reference(x: Tensor, factor: float = 1.0) -> Tensor:
        gated = x + x * layer.lora_g__a0
        return (gated @ layer.weight.T + layer.bias) * factor + gated @ layer.lora_A__a1.T @ layer.lora_B__a1.T

    got, expected = {
        "keyword": lambda: (layer(input=x), reference(x)),
        "extra": lambda: (layer(x, factor=2.0) + layer(x, 2.0), 2 * reference(x, 2.0)),
        "empty": lambda: (layer(x[:0]), reference(x[:0])),
        "vector": lambda: (layer(x[0]), reference(x[0])),
        "4d": lambda: (layer(x.expand(2, 5, 3, HIDDEN)), reference(x).expand(2, 5, 3, 8)),
        "strided": lambda: (layer(torch.randn(HIDDEN, 3, generator=torch.Generator().manual_seed(1)).T),
                            reference(torch.randn(HIDDEN, 3, generator=torch.Generator().manual_seed(1)).T)),
    }[call]()  # fmt: skip
    torch.testing.assert_close(got, expected)


def test_copies_and_pickles_are_independent() -> None:
    model = net()
    train(model, ll.attach(model, ll.LoRAConfig(**LORA)))
    expected, base = outputs(model), weights_hash(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin), expected)
        twin.layers[0].down_proj.lora_B.data += 1
        assert not torch.equal(outputs(twin), expected)
        ll.detach(twin)
        assert ll.adapters(twin) == {}
        assert torch.equal(outputs(model), expected)
    assert weights_hash(model) == base


def test_parameters_are_read_at_each_call() -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(**LORA))
    layer = model.layers[0].down_proj
    before = outputs(model)
    layer.lora_B = nn.Parameter(torch.ones_like(layer.lora_B))
    assert not torch.equal(outputs(model), before)
    swapped = {"layers.0.down_proj.lora_B": torch.zeros_like(layer.lora_B)}
    assert torch.equal(torch.func.functional_call(model, swapped, token_ids()), before)


def test_same_seed_same_tensors_whatever_else_is_targeted() -> None:
    first, second, other = net(), net(seed=5), net()
    ll.attach(first, ll.LoRAConfig(r=2), seed=7)
    ll.attach(second, ll.LoRAConfig(r=2, target_names="up_proj"), seed=7)
    ll.attach(other, ll.LoRAConfig(r=2), seed=8)
    assert torch.equal(first.layers[1].up_proj.lora_A, second.layers[1].up_proj.lora_A)
    assert not torch.equal(first.layers[1].up_proj.lora_A, other.layers[1].up_proj.lora_A)
    assert not torch.equal(first.layers[1].up_proj.lora_A, first.layers[0].up_proj.lora_A)


def test_the_name_of_the_adapter_is_in_the_seed() -> None:
    model, again = net(), net()
    for name in ("default", "style", "other"):
        ll.attach(model, ll.LoRAConfig(r=2), name=name)
    ll.attach(again, ll.LoRAConfig(r=2), name="style")
    layer = model.layers[1].up_proj
    assert not torch.equal(layer.lora_A, layer.lora_A__style)
    assert not torch.equal(layer.lora_A__other, layer.lora_A__style)
    assert torch.equal(again.layers[1].up_proj.lora_A__style, layer.lora_A__style)


def test_global_random_state_is_not_used() -> None:
    state = torch.random.get_rng_state()
    ll.attach(net(), ll.PiSSAConfig(r=2))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("base", "asked", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
    ],
)
def test_dtype_of_adapter_tensors(base: torch.dtype, asked: Any, expected: torch.dtype) -> None:
    model = net(base)
    ll.attach(model, ll.LoRAConfig(r=2, dtype=asked))
    assert model.layers[0].up_proj.lora_A.dtype == expected
    assert outputs(model).dtype == base


def test_ranks_and_alphas_per_target() -> None:
    model = net()
    adapter = ll.attach(
        model, ll.LoRAConfig(r=2, alpha=4, rank_pattern={"q_proj": 5}, alpha_pattern={"layers.1.*q_proj": 10})
    )
    assert model.layers[0].self_attn.q_proj.lora_A.shape == (5, HIDDEN)
    assert model.layers[0].self_attn.v_proj.lora_A.shape == (2, HIDDEN)
    scales = {name: target.cfg.scale for name, target in adapter.layers().items()}
    assert scales["layers.0.self_attn.q_proj"] == 4 / 5
    assert scales["layers.1.self_attn.q_proj"] == 2.0
    assert "r=2–5" in repr(adapter)


# --- group_init --------------------------------------------------------------------------------------------------


def grouped(toy: SimpleNamespace, group_init: Any) -> SimpleNamespace:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Config(ll.LowRankConfig):
        variant = "toy"

    @ll.hookimpl
    def param_specs(d_out: int, cfg: Any) -> dict[str, ll.ParamSpec]:
        return {"lora_h": ll.ParamSpec((cfg.r, d_out))}

    toy.Config, toy.param_specs, toy.group_init = Config, param_specs, ll.hookimpl(group_init)
    toy.forward = ll.hookimpl(lambda y, params: y + params["lora_h"].sum(0))
    return toy


def test_group_init_may_reconfigure_and_drop(registered: Any, toy: SimpleNamespace, tmp_path: Any) -> None:
    seen = []

    def group_init(model: nn.Module, targets: Any, cfg: Any) -> None:
        seen.append((type(model), len(targets), cfg.r))
        for target in targets:
            if "v_proj" in target.name:
                target.drop()
            elif "layers.1" in target.name:
                target.reconfigure(r=5, alpha=10.0)
                assert target.params["lora_h"].shape == (5, target.d_out)
                assert target.params["lora_h"] is target.layer.lora_h
                target.params["lora_h"].fill_(0.25)

    registered(grouped(toy, group_init), name="toy")
    model = net()
    adapter = ll.attach(model, toy.Config(r=3, target_names=("v_proj", "up_proj")))
    assert seen == [(type(model), 4, 3)]
    assert adapter.targets == ("layers.0.up_proj", "layers.1.up_proj")
    assert not hasattr(model.layers[0].self_attn.v_proj, "lora_h")
    assert not model.layers[0].self_attn.v_proj._forward_hooks
    assert model.layers[0].up_proj.lora_h.shape[0] == 3
    assert model.layers[1].up_proj.lora_h.shape[0] == 5
    expected = outputs(model)
    path = tmp_path / "adapter.safetensors"
    ll.save(model, path)
    assert ll.inspect(path).targets["layers.1.up_proj"]["overrides"] == {"r": 5, "alpha": 10.0}
    assert ll.inspect(path).targets["layers.0.up_proj"]["overrides"] == {}
    fresh = net()
    loaded = ll.load(fresh, path)
    assert len(seen) == 1, "load must not run group_init"
    assert torch.equal(outputs(fresh), expected)
    assert loaded.layers()["layers.1.up_proj"].cfg.r == 5


def test_targets_cannot_be_changed_afterwards(registered: Any, toy: SimpleNamespace) -> None:
    kept: list[Any] = []
    registered(grouped(toy, lambda targets: kept.extend(targets)), name="toy")
    ll.attach(net(), toy.Config())
    with pytest.raises(ll.ModelStateError, match="can only be changed inside group_init"):
        kept[0].drop()


def test_dropping_everything_is_an_error(registered: Any, toy: SimpleNamespace) -> None:
    registered(grouped(toy, lambda targets: [t.drop() for t in targets] and None), name="toy")
    model = net()
    before = snapshot(model)
    with pytest.raises(ll.TargetError, match="group_init of variant 'toy' dropped every target"):
        ll.attach(model, toy.Config())
    assert snapshot(model) == before


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_that_group_init_leaves_are_removed(registered: Any, toy: SimpleNamespace, fails: bool) -> None:
    def group_init(targets: Any, calibration_data: Any) -> None:
        targets[0].layer.register_forward_hook(lambda layer, args, output: output + 1)
        targets[1].layer.register_forward_pre_hook(lambda layer, args: None, with_kwargs=False)
        if fails:
            ll.calibration_batches(calibration_data, "toy")

    registered(grouped(toy, group_init), name="toy")
    model = net()
    before = snapshot(model)
    message = "'toy' needs calibration data" if fails else "group_init of variant 'toy' left a forward hook on layers.0"
    with pytest.raises(ll.CalibrationError if fails else ll.BrokenPlugin, match=message):
        ll.attach(model, toy.Config())
    assert snapshot(model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_calibration_data(registered: Any, toy: SimpleNamespace) -> None:
    batches: list[Any] = []

    def group_init(model: nn.Module, calibration_data: Any) -> None:
        for batch in ll.calibration_batches(calibration_data, "toy"):
            batches.append(batch)
            ll.run_batch(model, batch)

    registered(grouped(toy, group_init), name="toy")
    model = net()
    before = snapshot(model)
    for data, message in (
        (None, "variant 'toy' needs calibration data; give attach(…, calibration_data=batches)"),
        (iter([token_ids()]), "used up after one pass; give a list or a DataLoader"),
        ((token_ids() for _ in range(2)), "this generator is used up"),
        ([], "calibration data without a single batch"),
    ):
        with pytest.raises(ll.CalibrationError) as caught:
            ll.attach(model, toy.Config(), calibration_data=data)
        assert message in str(caught.value)
        assert snapshot(model) == before
    ll.attach(model, toy.Config(), calibration_data=[token_ids(), (token_ids(),), {"ids": token_ids()}])
    assert len(batches) == 3


def test_calibration_data_where_none_is_taken() -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(
        ll.CalibrationError, match="variant 'lora' takes no calibration data; leave calibration_data out"
    ):
        ll.attach(model, ll.LoRAConfig(), calibration_data=[token_ids()])
    assert snapshot(model) == before


# --- all or nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["param_specs", "init", "group_init", "fingerprint"])
def test_a_failure_anywhere_leaves_no_trace(registered: Any, toy: SimpleNamespace, where: str) -> None:
    calls = itertools.count()
    specs = toy.param_specs

    def fail(*arguments: Any) -> None:
        if next(calls) >= (0 if where == "group_init" else 3):
            raise RuntimeError("no luck")

    if where == "param_specs":
        toy.param_specs = ll.hookimpl(lambda d_out: fail() or specs(d_out))
    else:
        functions = {
            "init": lambda params: fail(),
            "group_init": lambda targets: fail(),
            "fingerprint": lambda layer: fail(),
        }
        setattr(toy, where, ll.hookimpl(functions[where]))
    registered(toy, name="toy")
    model = net()
    ll.attach(model, ll.LoRAConfig(**LORA), name="there")
    before, values = snapshot(model), outputs(model)
    with pytest.raises(RuntimeError, match="no luck"):
        ll.attach(model, toy.Config())
    assert snapshot(model) == before
    assert torch.equal(outputs(model), values)
    assert list(ll.adapters(model)) == ["there"]


@pytest.mark.parametrize("name", ["", "two words", "a__b", "1st", "über-all", None])
def test_invalid_names(name: Any) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(ll.AdapterNameError) as caught:
        ll.attach(model, ll.LoRAConfig(), name=name)
    assert (
        str(caught.value)
        == f"{name!r} is not an adapter name; use letters, digits and single underscores, as in 'style_2'"
    )
    assert snapshot(model) == before


def test_taken_name() -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(), name="style")
    before = snapshot(model)
    with pytest.raises(ll.AdapterNameError) as caught:
        ll.attach(model, ll.IA3Config(), name="style")
    assert str(caught.value) == (
        "an adapter called 'style' is attached already; detach(model, 'style') first, or give another name\n  attached: style"
    )
    assert snapshot(model) == before


def test_adapters_belong_to_one_module() -> None:
    model = net()
    ll.attach(model.layers, ll.LoRAConfig(r=2, target_names="up_proj"))
    before = snapshot(model)
    with pytest.raises(
        ll.ModelStateError, match="submodule 'layers' carries adapters of its own; attach to one and the same module"
    ):
        ll.attach(model, ll.IA3Config(), name="gates")
    assert snapshot(model) == before
    ll.detach(model.layers)
    ll.attach(model, ll.IA3Config(), name="gates")
    with pytest.raises(
        ll.ModelStateError, match="carries adapter 'gates', which was attached through an enclosing module"
    ):
        ll.attach(model.layers[0], ll.LoRAConfig(r=2))


def test_taken_attribute() -> None:
    model = net()
    model.layers[0].up_proj.lora_A = nn.Parameter(torch.zeros(1))
    before, values = snapshot(model), outputs(model)
    with pytest.raises(
        ll.AdapterNameError, match=r"layers.0.up_proj already has an attribute 'lora_A'; give this adapter another name"
    ):
        ll.attach(model, ll.LoRAConfig(r=2))
    assert snapshot(model) == before
    assert torch.equal(outputs(model), values)


@pytest.mark.parametrize(
    "call",
    [
        ll.detach,
        ll.adapters,
        lambda m, n: ll.disabled(m, n).__enter__(),
        lambda m, n: ll.save(m, "x.safetensors", name=n),
    ],
)
def test_unknown_adapter(call: Any) -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(), name="style")
    if call is ll.adapters:
        assert list(ll.adapters(model)) == ["style"]
        return
    with pytest.raises(ll.AdapterNameError) as caught:
        call(model, "styl")
    assert str(caught.value) == "no adapter is called 'styl'; did you mean 'style'?\n  attached: style"


def test_detaching_nothing() -> None:
    with pytest.raises(ll.AdapterNameError, match="no adapter is called 'default'\n  attached: none"):
        ll.detach(net())
    model = nn.Sequential(net())
    ll.attach(model[0], ll.LoRAConfig())
    with pytest.raises(ll.AdapterNameError, match="submodule '0' carries adapters: pass model.0"):
        ll.detach(model)


@pytest.mark.parametrize("seed", [None, "0", -1, 1.5, True])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(ll.ConfigError, match="a seed is a whole number from 0"):
        ll.attach(net(), ll.LoRAConfig(), seed=seed)


def test_a_config_that_would_not_survive_in_a_file(registered: Any, toy: SimpleNamespace) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Config(ll.AdapterConfig):
        variant = "toy"
        extra: Any = None

    toy.Config = Config
    registered(toy, name="toy")
    for extra in (print, {1: 2}, (1, (2, 3)), torch.zeros(2)):
        with pytest.raises(ll.ConfigError, match=r"would not survive in an adapter file; a field holds numbers"):
            ll.attach(net(), Config(extra=extra))
    ll.attach(net(), Config(extra=(1, 2)))


def test_a_config_that_forgets_its_base(registered: Any, toy: SimpleNamespace) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Config(ll.AdapterConfig):
        variant = "toy"

        def __post_init__(self) -> None:
            pass

    toy.Config = Config
    registered(toy, name="toy")
    with pytest.raises(ll.BrokenPlugin, match=r"Config.__post_init__ must begin with super\(\).__post_init__\(\)"):
        ll.attach(net(), Config(target_names="q_proj"))


def test_the_model_comes_first() -> None:
    model = net()
    adapter = ll.attach(model, ll.LoRAConfig())
    for call in (
        lambda: ll.detach(adapter),
        lambda: ll.save("a.safetensors", model),
        lambda: ll.save(adapter, "a.safetensors"),
    ):
        with pytest.raises(ll.ModelStateError, match="the first argument is the model, an nn.Module, not"):
            call()


def test_a_layer_that_is_gone_does_not_keep_the_rest(registered: Any) -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig())
    model.layers = model.layers[:1]
    ll.detach(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("lora" in name for name in model.state_dict())


def test_wrong_things_for_a_config() -> None:
    with pytest.raises(ll.ConfigError, match=r"attach takes a config such as LoRAConfig\(r=8\), not str"):
        ll.attach(net(), "lora")  # type: ignore[arg-type]
    with pytest.raises(ll.ModelStateError, match="attach takes an nn.Module, not str"):
        ll.attach("model", ll.LoRAConfig())  # type: ignore[arg-type]


# --- states of the model in which attaching would go wrong silently ----------------------------------------------


def refusal(model: nn.Module) -> str:
    before = snapshot(model) if not any(hasattr(p, "device_mesh") for p in model.parameters()) else None
    with pytest.raises(ll.ModelStateError) as caught:
        ll.attach(model, ll.LoRAConfig())
    assert before is None or snapshot(model) == before
    return str(caught.value)


def test_compiled_models_are_refused() -> None:
    assert "is compiled, and compiled code ignores hooks that come later" in refusal(
        torch.compile(net(), backend="eager")
    )
    model = net()
    model.layers[1].compile(backend="eager")
    message = refusal(model)
    assert message.startswith("layers.1 (Block) is compiled")
    assert message.endswith("the order is: load the base, attach, shard (FSDP2, DDP), compile")


def test_wrapped_models_are_refused() -> None:
    assert "wraps the model already" in refusal(nn.DataParallel(net()))


def test_sharded_models_are_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = net()
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(ll.ModelStateError) as caught:
            ll.attach(model, ll.LoRAConfig())
        assert "the model (FSDPNet) wraps the model already" in str(caught.value)
        assert not any("lora" in name for name in model.state_dict())
        inner = net()
        fully_shard(inner.layers[0], mesh=dist.init_device_mesh("cpu", (1,)))
        assert "layers.0 (FSDPBlock) wraps the model already" in refusal(inner)
        ours = net()
        ll.attach(ours, ll.LoRAConfig())
        fully_shard(ours, mesh=dist.init_device_mesh("cpu", (1,)))
        for call in (lambda: ll.detach(ours), lambda: ll.merge(ours), lambda: ll.export_lora(ours, "lora")):
            with pytest.raises(ll.ModelStateError, match="is sharded .a DTensor of FSDP2 or tensor parallelism"):
                call()
        wrapped = torch.nn.parallel.DistributedDataParallel(net())
        assert "(DistributedDataParallel) wraps the model already" in refusal(wrapped)
        assert "a DistributedDataParallel holds the model" in refusal(wrapped.module)
    finally:
        dist.destroy_process_group()


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(ll.ModelStateError, match="attach outside of it"):
        ll.attach(net(), ll.LoRAConfig())


def test_peft_models_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["q_proj"]))
    before = snapshot(model)
    with pytest.raises(ll.UnsupportedLayer, match="is wrapped by the peft package"):
        ll.attach(model, ll.LoRAConfig(target_names="q_proj"))
    assert snapshot(model) == before


def test_attaching_to_a_model_that_was_given_to_compile_is_refused() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    compiled(token_ids())
    assert "the model was given to torch.compile" in refusal(model)
    del compiled
    ll.attach(model, ll.LoRAConfig())
    torch.compiler.reset()


def test_what_is_compiled_at_its_first_call_after_attach_runs_the_adapter() -> None:
    torch.compiler.reset()  # nothing is compiled, so nothing was compiled without the adapter
    model = net()
    compiled = torch.compile(model, backend="eager")
    adapter = ll.attach(model, ll.LoRAConfig(r=2))
    train(model, adapter)
    adapted = model(token_ids())
    assert torch.equal(compiled(token_ids()), adapted)
    with ll.disabled(model):
        assert not torch.equal(model(token_ids()), adapted)
        assert torch.equal(compiled(token_ids()), model(token_ids()))
    torch.compiler.reset()


def test_two_models_of_one_class_do_not_share_a_graph() -> None:
    """With hook guards off, torch's default, the second would run the first one's graph: no v_proj adapter in it."""
    import torch._dynamo  # as after a first optimizer or compile

    first, second = net(), net()
    ll.attach(first, ll.LoRAConfig(r=2, target_names="q_proj"))
    adapter = ll.attach(second, ll.LoRAConfig(r=2, target_names=("q_proj", "v_proj")))
    torch.compile(first, backend="eager")(token_ids()).sum().backward()
    torch.compile(second, backend="eager")(token_ids()).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    torch.compiler.reset()


def test_fullgraph_compile_and_toggling() -> None:
    model = net()
    for number, cfg in enumerate((ll.LoRAConfig(r=2), ll.PiSSAConfig(r=2), ll.IA3Config(), ll.IA3FFConfig())):
        train(model, ll.attach(model, cfg, name=f"a{number}"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token_ids()), model(token_ids()))
    with ll.disabled(model, "a0"):
        torch.testing.assert_close(compiled(token_ids()), model(token_ids()))
    loss = compiled(token_ids()).square().mean()
    loss.backward()
    assert all(p.grad is not None for a in ll.adapters(model).values() for p in a.parameters())
    torch.compiler.reset()


# --- meta --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ll.LoRAConfig, ll.PiSSAConfig, ll.IA3Config, ll.IA3FFConfig])
def test_meta_then_initialize_equals_plain_attach(make: Any) -> None:
    source, model = net(), net().to("meta")
    adapter = ll.attach(model, make(), seed=3)
    assert all(t.device.type == "meta" for _, t in adapter.named_tensors())
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), strict=False)
    with pytest.raises(ll.ModelStateError, match=r"was attached on the meta device and has no values yet"):
        model(token_ids())
    with pytest.raises(ll.ModelStateError, match="has no values yet; call adapters"):
        ll.save(model, "nowhere.safetensors")
    assert adapter.initialize() is adapter
    plain = ll.attach(source, make(), seed=3)
    for (name, ours), (same, theirs) in zip(adapter.named_tensors(), plain.named_tensors(), strict=True):
        assert name == same
        assert torch.equal(ours, theirs)
    assert {n: t.fingerprint for n, t in adapter.layers().items()} == {
        n: t.fingerprint for n, t in plain.layers().items()
    }
    train(model, adapter)
    with pytest.raises(ll.ModelStateError, match="has its values already"):
        adapter.initialize()
    ll.detach(model)
    assert weights_hash(model) == weights_hash(net())


def test_meta_then_load(tmp_path: Any) -> None:
    source, model = net(), net().to("meta")
    train(source, ll.attach(source, ll.PiSSAConfig(r=2)))
    ll.save(source, tmp_path / "a.safetensors")
    ll.attach(model, ll.PiSSAConfig(r=2))
    with pytest.raises(
        ll.ModelStateError, match="is on the meta device and has no weights yet; load the base model's weights first"
    ):
        ll.load(model, tmp_path / "a.safetensors")
    assert not ll.adapters(model)["default"].record.ready, "the failed load must put the pending adapter back"
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict(), strict=False)
    other = net()
    ll.attach(other, ll.IA3Config()).save(tmp_path / "gates.safetensors")
    with pytest.raises(ll.AdapterNameError, match="'default' was attached on meta as 'pissa', this is a 'ia3'"):
        ll.load(model, tmp_path / "gates.safetensors")
    ll.load(model, tmp_path / "a.safetensors")
    assert torch.equal(outputs(model), outputs(source))


def test_meta_takes_calibration_data_later(registered: Any, toy: SimpleNamespace) -> None:
    def group_init(model: nn.Module, calibration_data: Any) -> None:
        for batch in ll.calibration_batches(calibration_data, "toy"):
            ll.run_batch(model, batch)

    registered(grouped(toy, group_init), name="toy")
    model = net().to("meta")
    with pytest.raises(ll.CalibrationError, match=r"give the data to adapter.initialize\(calibration_data=…\)"):
        ll.attach(model, toy.Config(), calibration_data=[token_ids()])
    adapter = ll.attach(model, toy.Config())
    with pytest.raises(ll.ModelStateError, match="is on the meta device"):
        adapter.initialize([token_ids()])
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict(), strict=False)
    with pytest.raises(ll.CalibrationError, match="needs calibration data"):
        adapter.initialize()
    assert not adapter.record.ready
    adapter.initialize([token_ids()])
    assert torch.equal(outputs(model), outputs(net()))


def replace_in_params(target: ll.Target) -> None:
    target.params["lora_h"] = torch.zeros(3)


def replace_on_layer(target: ll.Target) -> None:
    target.layer.lora_h = nn.Parameter(torch.zeros_like(target.layer.lora_h))


def reshape(target: ll.Target) -> None:
    target.params["lora_h"].data = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_in_params, r"target.params\['lora_h'\] = …: a tensor is not replaced but filled in place"),
        (replace_on_layer, r"group_init of variant 'toy', on .*, replaced params\['lora_h'\]"),
        (reshape, r"gave lora_h the shape \(3, 3\) by .data = …, where param_specs says \(16,\)"),
    ],
)
def test_group_init_fills_in_place(registered: Any, toy: Any, change: Any, message: str) -> None:
    @ll.hookimpl
    def group_init(targets: tuple[ll.Target, ...]) -> None:
        change(targets[0])

    toy.group_init = group_init
    registered(toy, name="toy")
    model = net()
    before = snapshot(model)
    with pytest.raises(ll.BrokenPlugin, match=message):
        ll.attach(model, toy.Config())
    assert snapshot(model) == before


def test_init_may_not_reshape_either(registered: Any, toy: Any) -> None:
    @ll.hookimpl
    def init(params: dict[str, torch.Tensor]) -> None:
        params["lora_h"].data = torch.zeros(3, 3)

    toy.init = init
    registered(toy, name="toy")
    with pytest.raises(ll.BrokenPlugin, match=r"init of variant 'toy' gave lora_h the shape \(3, 3\)"):
        ll.attach(net(), toy.Config())


def test_a_files_values_stand_before_init_and_after_it(registered: Any, toy: Any, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    @ll.hookimpl
    def param_specs(d_out: int) -> dict[str, ll.ParamSpec]:
        unsaved = ll.ParamSpec((d_out,), init="ones", trainable=False, persistent=False)
        return {"lora_h": ll.ParamSpec((d_out,)), "lora_n": unsaved}

    @ll.hookimpl
    def init(params: dict[str, torch.Tensor]) -> None:
        seen.append(params["lora_h"].clone())
        params["lora_n"].mul_(params["lora_h"] + 1)
        params["lora_h"].zero_()

    toy.param_specs, toy.init = param_specs, init
    registered(toy, name="toy")
    model = nn.Sequential(nn.Linear(4, 4))
    adapter = ll.attach(model, toy.Config())
    next(adapter.parameters()).data.fill_(2)
    adapter.save(tmp_path / "a.safetensors")
    loaded = dict(ll.load(nn.Sequential(nn.Linear(4, 4)), tmp_path / "a.safetensors").named_tensors())
    assert torch.equal(seen[-1], torch.full((4,), 2.0))
    assert torch.equal(loaded["0.lora_h"], torch.full((4,), 2.0))
    assert torch.equal(loaded["0.lora_n"], torch.full((4,), 3.0))
