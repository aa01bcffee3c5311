"""The conformance kit passes every variant of ours, and catches wrong ones with the check that is there for it."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite as ll
from lora_lite_core.testing import run_checks, variant_checks
from lora_lite_core.testing.check import CHECKS

from .usual import NEEDED

SMALL: dict[str, dict[str, Any]] = {
    "antipasto": {"r": 8},
    "c3a": {"block_size": 8},
    "trainable_tokens": {"rows": (1, 5)},
    **NEEDED,
}
EXPECTED = {
    "antipasto_ablate": {
        "gradients": "outside of its bounds the clamp keeps the gradient that leads back, whatever the outer one",
        "routed": "the same: gradients of parts of a batch do not add up there",
    },
    "deft": {"peft_round_trip": "PEFT keeps P, which is read as the start of an offset: another file, the same layer"},
    "lily": {"routed": "its routers average over the tokens of a call, as published; average=False does not"},
    "uni_lora": {"start_does_not_depend_on_other_layers": "its projection is normalised over all layers: PᵀP = I"},
    "dora": {"gradients": "the row norms carry no gradient, section 4.3 of the paper"},
    "trainable_tokens": {"embeddings": "rows are tokens: inputs of an embedding, outputs of a linear layer, its head"},
}


def config(name: str) -> ll.AdapterConfig:
    rank = {"r": 4} if issubclass(ll.get_variant(name).Config, ll.RankConfig) else {}
    return ll.LoraLiteConfig(variant=name, **{**rank, **SMALL.get(name, {})})


ALL = [info.name for info in ll.list_variants()]


FEW = ("dora", "eva", "hra", "ia3", "lora", "oft", "pissa", "road")


@pytest.mark.parametrize("name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in ALL])
def test_our_variants_keep_every_promise(name: str) -> None:
    results = run_checks(config(name), expected_failures=EXPECTED.get(name))
    assert len(results) == len(CHECKS) >= 25
    assert not [result.message for result in results if not result.ok]
    assert sum(result.seconds for result in results) < 60, "20 s on a quiet machine"


@variant_checks(ll.LoRAConfig(r=2, target_names=("q_proj",), rank_pattern={"q_proj": 3}))
def test_in_pytest_with_a_config_for_another_model(check: Callable[[], None]) -> None:
    check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongConfig(ll.LowRankConfig):
    variant = "wrong"

    r: int = 2


def right() -> types.SimpleNamespace:
    """LoRA: what the wrong ones are bent from."""

    @ll.hookimpl
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ll.ParamSpec]:
        return {"lora_A": ll.ParamSpec((cfg.r, d_in), "kaiming_uniform"), "lora_B": ll.ParamSpec((d_out, cfg.r))}

    @ll.hookimpl
    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
        return y + ll.lowrank_delta(x, params["lora_A"], params["lora_B"]).to(y.dtype)

    return types.SimpleNamespace(Config=WrongConfig, param_specs=param_specs, forward=forward, __name__="wrong")


Wrong = Callable[[types.SimpleNamespace], None]
WRONG: dict[str, tuple[str, Wrong]] = {}


def caught_by(check: str) -> Callable[[Wrong], Wrong]:
    def add(bend: Wrong) -> Wrong:
        WRONG[bend.__name__] = (check, bend)
        return bend

    return add


def delta(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    return ll.lowrank_delta(x, params["lora_A"], params["lora_B"])


@caught_by("identity_at_start")
def not_the_identity(v: types.SimpleNamespace) -> None:
    v.param_specs = ll.hookimpl(lambda d_in, d_out, cfg: {
        "lora_A": ll.ParamSpec((cfg.r, d_in), "kaiming_uniform"), "lora_B": ll.ParamSpec((d_out, cfg.r), "kaiming_uniform")
    })  # fmt: skip


@caught_by("identity_at_start")
def re_adds_the_base(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(
        lambda x, y, params, layer: F.linear(x, layer.weight * 1.1 - layer.weight * 0.1) + delta(x, params)
    )


@caught_by("every_trainable_tensor_moves")
def a_dead_tensor(v: types.SimpleNamespace) -> None:
    specs = v.param_specs
    v.param_specs = ll.hookimpl(lambda d_in, d_out, cfg: {**specs(d_in, d_out, cfg), "lora_unused": ll.ParamSpec((3,))})


@caught_by("every_trainable_tensor_moves")
def all_zeros(v: types.SimpleNamespace) -> None:
    v.param_specs = ll.hookimpl(
        lambda d_in, d_out, cfg: {"lora_A": ll.ParamSpec((cfg.r, d_in)), "lora_B": ll.ParamSpec((d_out, cfg.r))}
    )


@caught_by("strength")
def adds_to_the_output_in_place(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(lambda x, y, params: y.detach().clone().copy_(y.add_(delta(x, params))))


@caught_by("strength")
def adds_more_at_every_call(v: types.SimpleNamespace) -> None:
    calls = itertools.count()
    v.forward = ll.hookimpl(lambda x, y, params: y + (1 + 1e-3 * next(calls)) * delta(x, params))


@caught_by("routed")
def depends_on_how_many_rows_there_are(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(lambda x, y, params: y + delta(x, params) / len(x))


@caught_by("combined")
def doubles_in_batches_of_six(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(lambda x, y, params: y + delta(x, params) * (1 + (len(x) == 6)))


@caught_by("base_is_never_written")
def writes_the_weight(v: types.SimpleNamespace) -> None:
    def init(layer: nn.Module) -> None:
        layer.weight.data.mul_(0.999)

    v.init = ll.hookimpl(init)


@caught_by("base_is_never_written")
def keeps_state_on_the_layer(v: types.SimpleNamespace) -> None:
    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], layer: nn.Module) -> Tensor:
        layer.seen = getattr(layer, "seen", 0) + 1  # type: ignore[assignment]
        return y + delta(x, params)

    v.forward = ll.hookimpl(forward)


@caught_by("training_mode")
def draws_from_a_generator_of_its_own(v: types.SimpleNamespace) -> None:
    own = torch.Generator().manual_seed(0)

    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], training: bool) -> Tensor:
        change = delta(x, params).to(y.dtype)
        return y + change * torch.rand(change.shape, generator=own) if training else y + change

    v.forward = ll.hookimpl(forward)


@caught_by("training_mode")
def another_dtype_in_training(v: types.SimpleNamespace) -> None:
    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], training: bool) -> Tensor:
        change = delta(x, params)
        return y + (change * torch.rand(change.shape[-1], dtype=torch.float64) if training else change.to(y.dtype))

    v.forward = ll.hookimpl(forward)


@caught_by("reads_what_it_is_given")
def keeps_a_table_in_the_module(v: types.SimpleNamespace) -> None:
    pairs: dict[int, Tensor] = {}

    def init(params: dict[str, Tensor], generator: torch.Generator) -> None:
        d_in = params["lora_A"].shape[1]
        pairs.setdefault(d_in, torch.randn(2, d_in, generator=generator))

    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
        A = pairs[x.shape[-1]].to(x.dtype)
        return y + F.linear(F.linear(x, A + params["lora_A"].to(x.dtype)), params["lora_B"].to(x.dtype)).to(y.dtype)

    v.init, v.forward = ll.hookimpl(init), ll.hookimpl(forward)


@caught_by("convolutions")
def asks_the_layer_for_its_width(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(
        lambda x, y, params, layer: y + delta(x, params).to(y.dtype) * (1.0 if layer.in_features else 0.0)
    )


@caught_by("no_copies")
def a_copy_a_layer(v: types.SimpleNamespace) -> None:
    def same(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))

    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ll.ParamSpec]:
        return {"lora_A": ll.ParamSpec((cfg.r, d_in), same, trainable=False), "lora_B": ll.ParamSpec((d_out, cfg.r))}

    v.param_specs = ll.hookimpl(param_specs)


@caught_by("two_models_side_by_side")
def passes_values_to_its_own_backward_through_the_module(v: types.SimpleNamespace) -> None:
    kept: dict[str, Tensor] = {}

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            ctx.save_for_backward(A, B)
            kept["x"] = x
            return F.linear(F.linear(x, A), B)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
            (A, B), x = ctx.saved_tensors, kept["x"].flatten(0, -2)
            rows = g.flatten(0, -2)[: len(x)]
            return g @ B @ A, (rows @ B).T @ x, rows.T @ F.linear(x, A)

    v.forward = ll.hookimpl(
        lambda x, y, params: y + Product.apply(x, *(params[n].to(x.dtype) for n in ("lora_A", "lora_B"))).to(y.dtype)
    )


@caught_by("training_goes_on_after_reload")
def an_average_that_is_not_saved(v: types.SimpleNamespace) -> None:
    specs = v.param_specs
    v.param_specs = ll.hookimpl(lambda d_in, d_out, cfg: {
        **specs(d_in, d_out, cfg), "lora_seen": ll.ParamSpec((1,), as_buffer=True, persistent=False)
    })  # fmt: skip

    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            params["lora_seen"].add_(1)
        return y + delta(x, params).to(y.dtype) * (1 + 0.3 * params["lora_seen"].to(y.dtype))

    v.forward = ll.hookimpl(forward)


@caught_by("inputs_are_not_written")
def writes_its_input(v: types.SimpleNamespace) -> None:
    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
        change = delta(x, params)
        x.data += 1e-3
        return y + change

    v.forward = ll.hookimpl(forward)


@caught_by("inputs_are_not_written")
def writes_its_output(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(lambda x, y, params: y.add_(delta(x, params).to(y.dtype)))


@caught_by("rows_are_independent")
def branches_on_the_data(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(
        lambda x, y, params: y + delta(x, params) * (2 if x.numel() and float(x.abs().max()) > 20 else 1)
    )


@caught_by("rows_are_independent")
def batch_statistics(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(lambda x, y, params: y + delta(x - x.flatten(0, -2).mean(0), params))


UNSAVED_A = ll.hookimpl(
    lambda d_in, d_out, cfg: {
        "lora_A": ll.ParamSpec((cfg.r, d_in), trainable=False, persistent=False),
        "lora_B": ll.ParamSpec((d_out, cfg.r)),
    }
)


@caught_by("unsaved_tensors_are_continuous")
def directions_that_are_not_saved(v: types.SimpleNamespace) -> None:
    v.param_specs = UNSAVED_A

    def init(layer: nn.Module, params: dict[str, Tensor]) -> None:
        params["lora_A"].copy_(torch.linalg.svd(ll.dense_weight(layer).float())[2][:2])

    v.init = ll.hookimpl(init)


@caught_by("unsaved_tensors_are_continuous")
def draws_that_are_not_saved(v: types.SimpleNamespace) -> None:
    v.param_specs = UNSAVED_A

    def init(params: dict[str, Tensor], generator: torch.Generator) -> None:
        params["lora_A"].uniform_(generator=generator)

    v.init = ll.hookimpl(init)


@caught_by("peft_round_trip")
def forgets_the_scale_on_the_way_to_peft(v: types.SimpleNamespace) -> None:
    v.to_peft = ll.hookimpl(lambda params: ({"peft_type": "WRONG"}, {"a": params["lora_A"] * 2, "b": params["lora_B"]}))
    v.from_peft = ll.hookimpl(lambda tensors: ({}, {"lora_A": tensors["a"], "lora_B": tensors["b"]}))


@caught_by("peft_round_trip")
def forgets_what_it_has_masked_on_the_way_to_peft(v: types.SimpleNamespace) -> None:
    """The mask is a schedule's own state and need not come back, but the layer computes something else without."""
    specs = v.param_specs
    v.param_specs = ll.hookimpl(
        lambda d_in, d_out, cfg: {**specs(d_in, d_out, cfg), "lora_m": ll.ParamSpec((cfg.r,), "ones", as_buffer=True)}
    )
    v.forward = ll.hookimpl(
        lambda x, y, params: (
            y + delta(x, {**params, "lora_A": params["lora_m"][:, None] * params["lora_A"]}).to(y.dtype)
        )
    )

    def before_step(targets: Any) -> None:
        for target in targets:
            target.params["lora_m"][0] = 0

    v.before_step = ll.hookimpl(before_step)
    v.to_peft = ll.hookimpl(lambda params: ({"peft_type": "WRONG"}, {"a": params["lora_A"], "b": params["lora_B"]}))
    v.from_peft = ll.hookimpl(
        lambda tensors: ({}, {"lora_A": tensors["a"], "lora_B": tensors["b"], "lora_m": torch.ones(2)})
    )


def as_lora(params: dict[str, Tensor], alpha: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields = {"peft_type": "LORA", "r": len(params["lora_A"]), "lora_alpha": alpha, "lora_dropout": 0.0}
    fields |= {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return fields, {"lora_A.weight": params["lora_A"], "lora_B.weight": params["lora_B"]}


@caught_by("peft_round_trip")
def writes_a_lora_of_another_scale(v: types.SimpleNamespace) -> None:
    v.to_peft = ll.hookimpl(lambda params: as_lora(params, 3.0 * len(params["lora_A"])))
    v.from_peft = ll.hookimpl(lambda: None)


@caught_by("peft_round_trip")
def writes_what_nobody_reads(v: types.SimpleNamespace) -> None:
    v.to_peft = ll.hookimpl(lambda params: ({"peft_type": "WRONG"}, {"a": params["lora_A"]}))
    v.from_peft = ll.hookimpl(lambda: None)


@caught_by("any_leading_shape")
def two_dimensions_only(v: types.SimpleNamespace) -> None:
    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
        batch, length, _ = x.shape
        return y + delta(x.view(batch * length, -1), params).view(batch, length, -1).to(y.dtype)

    v.forward = ll.hookimpl(forward)


@caught_by("reload_on_a_fresh_model")
def forgotten_persistence(v: types.SimpleNamespace) -> None:
    v.param_specs = ll.hookimpl(lambda d_in, d_out, cfg: {
        "lora_A": ll.ParamSpec((cfg.r, d_in), "kaiming_uniform", as_buffer=True, persistent=False), "lora_B": ll.ParamSpec((d_out, cfg.r)),
    })  # fmt: skip

    def init(params: dict[str, Tensor]) -> None:
        params["lora_A"].copy_(torch.randn(params["lora_A"].shape))

    v.init = ll.hookimpl(init)


@caught_by("start_depends_on_the_seed_alone")
def global_randomness(v: types.SimpleNamespace) -> None:
    def init(params: dict[str, Tensor]) -> None:
        params["lora_A"].copy_(torch.randn(params["lora_A"].shape))

    v.init = ll.hookimpl(init)


@caught_by("quiet")
def consumes_pythons_randomness(v: types.SimpleNamespace) -> None:
    def init(params: dict[str, Tensor]) -> None:
        params["lora_A"].mul_(1 + 0 * random.random())

    v.init = ll.hookimpl(init)


@caught_by("quiet")
def prints(v: types.SimpleNamespace) -> None:
    def init(params: dict[str, Tensor]) -> None:
        print(params["lora_A"].shape)  # noqa: T201

    v.init = ll.hookimpl(init)


@caught_by("forward_is_repeatable")
def noise_in_forward(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(lambda x, y, params: y + delta(x, params) * (1 + 0.01 * torch.randn(())))


@caught_by("forward_is_repeatable")
def trains_in_forward(v: types.SimpleNamespace) -> None:
    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
        change = delta(x, params).to(y.dtype)
        params["lora_B"].data.mul_(0.99)
        return y + change

    v.forward = ll.hookimpl(forward)


@caught_by("quantised_layers")
def decomposes_packed_codes(v: types.SimpleNamespace) -> None:
    def init(layer: nn.Module, params: dict[str, Tensor]) -> None:
        values = layer.weight.detach().flatten().float()  # the codes of a packed layer
        params["lora_A"].copy_(values[: params["lora_A"].numel()].reshape(params["lora_A"].shape))

    v.init = ll.hookimpl(init)


def frozen_basis(v: types.SimpleNamespace) -> None:
    v.param_specs = ll.hookimpl(lambda d_in, d_out, cfg: {
        "lora_A": ll.ParamSpec((cfg.r, d_in), trainable=False), "lora_B": ll.ParamSpec((d_out, cfg.r)),
    })  # fmt: skip

    def init(layer: nn.Module, params: dict[str, Tensor]) -> None:
        params["lora_A"].copy_(ll.dense_weight(layer)[: len(params["lora_A"])])

    v.init = ll.hookimpl(init)


@caught_by("wrong_base_is_refused")
def no_fingerprint(v: types.SimpleNamespace) -> None:
    frozen_basis(v)


@caught_by("wrong_base_is_refused")
def blind_fingerprint(v: types.SimpleNamespace) -> None:
    frozen_basis(v)
    v.fingerprint = ll.hookimpl(lambda layer: torch.ones(17))


@caught_by("low_precision")
def wrong_dtype_out(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(lambda x, y, params: y.float() + delta(x, params).float())


@caught_by("parameters_are_read_at_each_call")
def cached_parameters(v: types.SimpleNamespace) -> None:
    kept: dict[int, Tensor] = {}

    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], layer: nn.Module) -> Tensor:
        B = kept.setdefault(id(layer), params["lora_B"])
        return y + ll.lowrank_delta(x, params["lora_A"], B).to(y.dtype)

    v.forward = ll.hookimpl(forward)


@caught_by("copies_are_independent")
def closure_over_the_layer(v: types.SimpleNamespace) -> None:
    first: dict[tuple[int, ...], list[Tensor]] = {}

    def init(layer: nn.Module, params: dict[str, Tensor]) -> None:
        first[tuple(params["lora_B"].shape) + tuple(params["lora_A"].shape)] = [params["lora_A"], params["lora_B"]]

    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
        A, B = first[tuple(params["lora_B"].shape) + tuple(params["lora_A"].shape)]
        return y + ll.lowrank_delta(x, A, B).to(y.dtype) + 0 * delta(x, params).to(y.dtype)

    v.init, v.forward = ll.hookimpl(init), ll.hookimpl(forward)


@caught_by("affine_as_declared")
def not_affine(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(lambda x, y, params: y + torch.tanh(delta(x, params)).to(y.dtype))


@caught_by("affine_as_declared")
def affine_but_declared_not(v: types.SimpleNamespace) -> None:
    v.AFFINE = False


@caught_by("disabled_is_the_base")
def replaces_forward(v: types.SimpleNamespace) -> None:
    def init(layer: Any, params: dict[str, Tensor]) -> None:
        old, B = layer.forward, params["lora_B"]
        layer.forward = lambda x: old(x) + B.sum()

    v.init = ll.hookimpl(init)


@caught_by("gradients")
def cuts_the_gradient(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(lambda x, y, params: y + delta(x.detach(), params).to(y.dtype))


@caught_by("gradients")
def float32_in_float64(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(
        lambda x, y, params: (
            y + F.linear(F.linear(x.float(), params["lora_A"].float()), params["lora_B"].float()).to(y.dtype)
        )
    )


@caught_by("compiles_without_a_break")
def a_choice_in_python(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(
        lambda x, y, params: y + (delta(x, params) if params["lora_B"].sum() < 1e9 else x).to(y.dtype)
    )


@caught_by("checkpointing")
def counts_its_calls(v: types.SimpleNamespace) -> None:
    calls = [0]

    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
        calls[0] += 1
        return y + delta(x, params).to(y.dtype) * (1 + 0.1 * (calls[0] % 7))

    v.forward = ll.hookimpl(forward)


@caught_by("specs_are_pure")
def shapes_by_the_weight(v: types.SimpleNamespace) -> None:
    sizes = iter(range(2, 10_000))
    v.param_specs = ll.hookimpl(lambda d_in, d_out: {
        "lora_A": ll.ParamSpec((rank := next(sizes), d_in), "kaiming_uniform"), "lora_B": ll.ParamSpec((d_out, rank)),
    })  # fmt: skip


@caught_by("loss_falls")
def uphill(v: types.SimpleNamespace) -> None:
    class Up(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            return t.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return -gradient

    v.forward = ll.hookimpl(lambda x, y, params: y + Up.apply(delta(x, params)).to(y.dtype))


@caught_by("two_adapters_on_one_layer")
def one_set_of_tensors_for_all(v: types.SimpleNamespace) -> None:
    def forward(x: Tensor, y: Tensor, layer: Any) -> Tensor:
        names = [name for name in layer._parameters if name.startswith("lora_B")]
        A, B = layer._parameters[names[0].replace("lora_B", "lora_A")], layer._parameters[names[0]]
        return y + ll.lowrank_delta(x, A, B).to(y.dtype)

    v.forward = ll.hookimpl(forward)


@caught_by("reload_under_another_name")
def attributes_by_their_own_name(v: types.SimpleNamespace) -> None:
    v.forward = ll.hookimpl(lambda x, y, layer: y + ll.lowrank_delta(x, layer.lora_A, layer.lora_B).to(y.dtype))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_variants_are_caught(name: str, registered: Any) -> None:
    check, bend = WRONG[name]
    namespace = right()
    bend(namespace)
    registered(namespace, name="wrong")
    (result,) = run_checks(WrongConfig(), only=[check])
    assert result.outcome == "failed", name
    assert f"'wrong' breaks a promise: {CHECKS[check].promise}" in result.message
    assert "\n  seen: " in result.message
    assert f"\n  to mend: {CHECKS[check].mend}" in result.message


def test_what_cannot_be_attached_is_said_once(registered: Any) -> None:
    namespace = right()
    namespace.param_specs = ll.hookimpl(lambda d_in, cfg: {"A": ll.ParamSpec((cfg.r, d_in))})
    registered(namespace, name="wrong")
    (result,) = run_checks(WrongConfig())
    assert result.name == "attaches"
    assert "seen: BrokenPlugin: " in result.message
    assert "names start with lora_" in result.message
    (other,) = run_checks(WrongConfig(), only=["gradients"])
    assert other.message == "not tried: 'wrong' cannot be attached and run; see `attaches`"


def test_errors_in_the_variants_own_file_come_with_the_line(registered: Any) -> None:
    namespace = right()
    namespace.__file__ = __file__
    namespace.forward = ll.hookimpl(lambda x, params: x @ params["lora_A"])
    registered(namespace, name="wrong")
    (result,) = run_checks(WrongConfig())
    assert re.search(r"at: .*test_kit\.py, line \d+: namespace\.forward = ll\.hookimpl\(lambda x", result.message)


def test_what_is_random_is_not_called_a_nonlinearity(registered: Any) -> None:
    namespace = right()
    namespace.forward = ll.hookimpl(lambda x, y, params: y + delta(x, params) * (1 + 0.01 * torch.randn(())))
    registered(namespace, name="wrong")
    (result,) = run_checks(WrongConfig(), only=["affine_as_declared"])
    assert "two calls on the same rows differ, so that it is not one function of them" in result.message
    assert (
        "to mend: take what is random out of forward first; for a nonlinearity declare AFFINE = False" in result.message
    )


def test_a_variant_that_asks_for_training_may_draw_then(registered: Any) -> None:
    namespace = right()
    namespace.forward = ll.hookimpl(
        lambda x, y, params, training: y + delta(F.dropout(x, 0.3, training), params).to(y.dtype)
    )
    registered(namespace, name="wrong")
    assert [r.message for r in run_checks(WrongConfig()) if not r.ok] == []


@pytest.mark.parametrize(("declared", "outcome"), [(0.5, "passed"), (0.1, "failed")])
def test_a_declared_deviation_holds_in_bfloat16_too(registered: Any, declared: float, outcome: str) -> None:
    namespace = right()
    namespace.forward = ll.hookimpl(lambda y: y + 0.3)
    namespace.IDENTITY_ATOL, namespace.IDENTITY_REASON = declared, "a shift"
    registered(namespace, name="wrong")
    (result,) = run_checks(WrongConfig(), only=["identity_at_start"])
    assert result.outcome == outcome, result.message


def test_the_right_one_passes(registered: Any) -> None:
    registered(right(), name="wrong")
    assert [r.message for r in run_checks(WrongConfig()) if not r.ok] == []


def test_expected_failures_are_strict(registered: Any) -> None:
    namespace = right()
    not_affine(namespace)
    registered(namespace, name="wrong")
    (result,) = run_checks(WrongConfig(), only=["affine_as_declared"], expected_failures={"affine_as_declared": "tanh"})
    assert (result.outcome, result.ok) == ("expected failure", True)
    (result,) = run_checks(WrongConfig(), only=["quiet"], expected_failures={"quiet": "prints"})
    assert (result.outcome, result.ok) == ("unexpectedly passed", False)
    with pytest.raises(ll.ConfigError, match="no check is called 'quite'; did you mean 'quiet'?"):
        run_checks(WrongConfig(), expected_failures={"quite": "typo"})


def test_there_are_enough_wrong_ones() -> None:
    assert len(WRONG) >= 20
    assert {check for check, _ in WRONG.values()} <= set(CHECKS)
