"""What an adapted layer computes, as a matrix and a vector, without any code in the variant: it is probed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attached.layer_hooks.layer_state import blended, is_acting, state_of, targets_on
from ..attached.targets.experts import single
from ..attached.tensors.declared import check_not_flat
from ..contract.errors import MergeError, ModelStateError
from ..contract.target import Params, Target
from ..layers.kinds.embedding import is_embedding
from ..layers.kinds.layer_kinds import layer_device
from ..layers.rollback import Modes
from ..layers.twins import twin_of
from ..layers.weight_reading import PROBE_ROWS, base_forward, bias_of, dense_weight

READING = ("merged", "disabled", "routed")  # the with-blocks inside of which no adapter is merged or exported
AFFINE_TOLERANCE = 1e-6  # relative; affine variants stay below 1e-12, a tanh of size 1e-3 shows as 2e-5


@dataclass
class AffineMap:
    """y = weight x + bias of the adapted layer, and the frozen layer's own: float64, (d_out, d_in) and (d_out,)."""

    weight: Tensor
    bias: Tensor
    base_weight: Tensor
    base_bias: Tensor


@torch.no_grad()
def adapted_map(
    name: str, layer: nn.Module, targets: Sequence[Target], *, anywhere: bool = False, inactive: bool = False
) -> AffineMap:
    """The layer `name` with these adapters, run on a dense float64 twin of it; `inactive`: also of those that
    are not active; `anywhere`: of these, and at other values of what is trained than they have.

    Raises MergeError when an adapter tensor or the result is not finite, and, with the measured residual, when the
    adapted layer is not affine in x; ModelStateError when an adapter is switched off or has no values yet.
    """
    for target in targets:
        refuse_block(target)
        if target.variant.asks("context"):
            raise MergeError(
                f"{name} with '{target.adapter}' ({target.variant.name}) computes another thing with every call of the "
                "model (it asks for its context); it cannot be merged or exported, only run"
            )
        if not target.variant.affine:
            raise MergeError(
                f"{name} with '{target.adapter}' ({target.variant.name}) is not affine in its input, as the variant "
                "says of itself (AFFINE = False); it cannot be merged or exported, only run"
            )
    device = layer_device(layer)
    device = torch.device("cpu") if device.type == "mps" else device  # no float64 there
    params = [_params(name, target, layer, device, anywhere, inactive) for target in targets]
    # As a decorator, so that no interrupt comes between the end of a with-block and its leaving.
    modes = Modes()
    try:
        return torch.autocast(device.type, enabled=False)(_probed)(name, layer, targets, params, device)
    except BaseException:
        modes.restore()
        raise


def _probed(
    name: str, layer: nn.Module, targets: Sequence[Target], params: list[dict[str, Tensor]], device: torch.device
) -> AffineMap:
    if is_embedding(layer):
        return _table(layer, targets, params, device)
    twin = dense_twin(layer, device)
    d_in, d_out = twin.in_features, twin.out_features
    shift = _run(twin, targets, params, torch.zeros(1, d_in, dtype=torch.float64, device=device))[0]
    weight = torch.empty(d_out, d_in, dtype=torch.float64, device=device)
    reads_input = any(target.variant.forward_input is not None for target in targets)
    for start in range(0, d_in, PROBE_ROWS):
        rows = torch.zeros(min(PROBE_ROWS, d_in - start), d_in, dtype=torch.float64, device=device)
        rows[:, start:].fill_diagonal_(1)
        # Of a row of the identity the frozen layer makes a column of its weight: no need to multiply.
        known = None if reads_input else twin.weight[:, start : start + len(rows)].T + twin.bias
        weight[:, start : start + len(rows)] = (_run(twin, targets, params, rows, known) - shift).T
    found = AffineMap(weight, shift, twin.weight.detach(), twin.bias.detach())
    _check_affine(name, twin, targets, params, found)
    return found


def _table(
    layer: nn.Embedding, targets: Sequence[Target], params: list[dict[str, Tensor]], device: torch.device
) -> AffineMap:
    """Of an embedding every token is looked up: whatever the adapters make of it is a table again."""
    twin = twin_of(layer).to(device, torch.float64)
    base = dense_weight(twin).T
    rows = torch.empty_like(base)
    for ids in torch.arange(len(base), device=device).split(16 * PROBE_ROWS):
        rows[ids] = _run(twin, targets, params, ids, base[ids])
    zeros = base.new_zeros(base.shape[1])
    return AffineMap(rows.T, zeros, base.T, zeros)


def dense_twin(layer: nn.Module, device: torch.device) -> nn.Linear:
    """A plain float64 nn.Linear, in eval mode, that computes what the frozen layer does; its bias may be zeros."""
    weight, bias = dense_weight(layer), bias_of(layer)
    twin = nn.Linear(weight.shape[1], weight.shape[0], device="meta").eval()
    twin.weight = nn.Parameter(weight.to(device, torch.float64), requires_grad=False)
    twin.bias = nn.Parameter(bias.to(device, torch.float64), requires_grad=False)
    return twin


def adapters_alone(of: Target, adapters: Sequence[str], *, for_good: bool = False) -> tuple[Target, ...]:
    """All targets of these adapters on the target's layer, in the order in which they act. Others on the layer may stay
    where they and these add up, whatever values they will have; MergeError, with the measured interaction, where not.
    `for_good`: also those that are not active now.
    """
    state = state_of(of.layer)
    held = [target for target in (state.acting if state else ()) if target.part == of.part]
    found = [target for target in targets_on(of.layer) if target.part == of.part and target not in held]
    held += found if for_good else [target for target in found if target.adapter in adapters]
    ours = tuple(target for target in held if target.adapter in adapters)
    others = tuple(target for target in held if target.adapter not in adapters)
    if others:
        _check_independent(of, held, ours, others)
    return ours


@torch.no_grad()
def _check_independent(of: Target, held: Sequence[Target], ours: Sequence[Target], others: Sequence[Target]) -> None:
    """Ours add to what the others do, and the others do the same where ours are in the weight. Of fused experts the
    first one is probed."""
    first = {id(target): single(target)[0] if target.experts else target for target in held}
    path, layer = first[id(of)].name, first[id(of)].layer
    together = f"merge or export all of them together (name=None), or detach '{others[0].adapter}' first"
    if is_embedding(layer):
        raise MergeError(f"{of.name} carries adapter '{others[0].adapter}', too; {together}")
    whole, one, two = (
        adapted_map(path, layer, [first[id(target)] for target in targets], anywhere=True)
        for targets in (held, ours, others)
    )
    on_merged = dense_twin(layer, one.weight.device)  # as the others will find it; some read the weight
    on_merged.weight = nn.Parameter(one.weight, requires_grad=False)
    on_merged.bias = nn.Parameter(one.bias, requires_grad=False)
    rest = [replace(first[id(target)], seen=Params(first[id(target)].params)) for target in others]
    then = adapted_map(path, on_merged, rest, anywhere=True)
    size = float((whole.weight - one.base_weight).norm() + (whole.bias - one.base_bias).norm()) or 1.0
    added = (whole.weight - one.weight - two.weight + one.base_weight, whole.bias - one.bias - two.bias + one.base_bias)
    later = (whole.weight - then.weight, whole.bias - then.bias)
    off = max(float(weight.norm() + bias.norm()) / size for weight, bias in (added, later))
    if off > AFFINE_TOLERANCE:
        raise MergeError(
            f"{of.name} carries adapter '{others[0].adapter}', too, and what one adds depends on the other ({off:.1e} "
            f"of the change is their interaction); {together}"
        )


def refuse_block(target: Target) -> None:
    if target.kind == "block":
        raise MergeError(
            f"{target.name} with '{target.adapter}' ({target.variant.name}) is a whole block, which has no weight to "
            "merge into; it can only be run"
        )


def check_usable(name: str, target: Target, layer: nn.Module, *, inactive: bool = False) -> None:
    """Raise ModelStateError for an adapter that has no values or is off, MergeError for one that is not finite."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        check_not_flat(target)
    if not target.ready:
        raise ModelStateError(f"adapter '{target.adapter}' has no values yet; call initialize() or load(model, path)")
    if not inactive and not is_acting(target):
        raise ModelStateError(
            f"adapter '{target.adapter}' is not active; leave the block that switches it off, or type "
            f"activate(model, '{target.adapter}')"
        )
    if target.strength is not None and target.strength.dim():
        raise MergeError(f"adapter '{target.adapter}' has a strength for each row of a batch, which no weight can have")
    for bare, tensor in target.params_on(layer).items():
        if not tensor.isfinite().all():
            raise MergeError(
                f"{bare} of adapter '{target.adapter}' on {name} holds NaN or infinity; nothing was written"
            )


def _params(
    name: str, target: Target, layer: nn.Module, device: torch.device, anywhere: bool, inactive: bool
) -> dict[str, Tensor]:
    check_usable(name, target, layer, inactive=inactive or anywhere)
    found: dict[str, Tensor] = {}
    for bare, tensor in target.params_on(layer).items():
        value = tensor.detach().to(device, torch.float64 if tensor.is_floating_point() else tensor.dtype)
        if anywhere and value.is_floating_point() and isinstance(tensor, nn.Parameter):
            seed = zlib.crc32(f"{target.adapter}.{bare}".encode())
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            value = value + 0.1 * noise.to(device)
        found[bare] = value
    return found


def _run(
    twin: nn.Module, targets: Sequence[Target], params: list[dict[str, Tensor]], x: Tensor, y: Tensor | None = None
) -> Tensor:
    """The adapted layer on x, as its hooks run it; y is the frozen layer's output where it is known already."""
    pairs = list(zip(targets, params, strict=True))
    for target, tensors in pairs:
        if target.variant.forward_input is not None:
            made = target.variant.forward_input({**_given(twin, target, tensors), "x": x})
            x = made if target.strength is None else blended(x, made, target.strength, target)
    out: Tensor = base_forward(twin, x) if y is None else y
    for target, tensors in pairs:
        if target.variant.forward is not None:
            made = target.variant.forward({**_given(twin, target, tensors), "x": x, "y": out})
            out = made if target.strength is None else blended(out, made, target.strength, target)
    return out


def _given(twin: nn.Module, target: Target, params: dict[str, Tensor]) -> dict[str, Any]:
    return {"params": params, "cfg": target.cfg, "layer": twin, "training": False}


def _check_affine(
    name: str, twin: nn.Linear, targets: Sequence[Target], params: list[dict[str, Tensor]], found: AffineMap
) -> None:
    """Compare with the map on rows it was not made of, small and large ones."""
    generator = torch.Generator().manual_seed(0)
    residual = 0.0
    for scale in (1e-2, 1.0, 1e2):
        x = scale * torch.randn(8, twin.in_features, generator=generator, dtype=torch.float64)
        x = x.to(found.weight.device)
        expected = x @ found.weight.T
        # Of an adapted layer that puts out nearly nothing, what is left is the rounding of the frozen one.
        size = float(expected.norm() + found.bias.norm() + 1e-6 * base_forward(twin, x).norm()) or 1.0
        residual = max(residual, float((_run(twin, targets, params, x) - expected - found.bias).norm()) / size)
    names = listed_variants(targets)
    if not residual < AFFINE_TOLERANCE:  # NaN fails, too
        raise MergeError(
            f"{name} with {names} is not affine in its input: on random rows it is off by {residual:.1e} of the output "
            "from the best matrix and bias; it cannot be merged or exported, only run"
        )


def listed_variants(targets: Sequence[Target]) -> str:
    return " and ".join(f"'{target.adapter}' ({target.variant.name})" for target in targets)
