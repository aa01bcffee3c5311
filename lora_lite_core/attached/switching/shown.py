"""What people see of the adapters on a model: in a line each, and as a table."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ...contract.config import RankConfig
from ...contract.target import Target
from ...contract.text import count, table
from ..records import present_targets, record_of, records_of
from ..targets.train_modules import current
from .activity import Acting, acting_on


def as_table(model: nn.Module) -> str:
    """A row for each adapter: its place in the order of those that act, and how strong it is."""
    acting = acting_on(model)
    rows = [_row(model, name, acting) for name in records_of(model).adapters]
    return table(("name", "variant", "rank", "layers", "trainable", "active", "strength"), rows)


def in_words(model: nn.Module, name: str) -> str:
    """<Adapter 'style': lora, r=8, 14 layers, …>"""
    present, acting = present_targets(model, name), acting_on(model)
    strength = acting.strengths.get(name)
    gone = sum(target is None for target in present.values())
    ranks, trained = _ranks(present.values()), _trained(model, name)
    total = sum(p.numel() for p in model.parameters())
    parts = [
        f"{record_of(model, name).variant.name}{ranks and f', r={ranks}'}",
        count(len(present), "layer") + (f", {gone} of them replaced since" if gone else ""),
        f"{count(trained, 'trainable parameter')} ({trained / max(total, 1):.2%})",
        *([] if name in acting.names else ["not active"]),
        *([] if strength is None else [f"strength {_spelled(strength)}"]),
    ]
    return f"<Adapter '{name}': {', '.join(parts)}>"


def _row(model: nn.Module, name: str, acting: Acting) -> tuple[object, ...]:
    present, variant = present_targets(model, name), record_of(model, name).variant.name
    place = f"{acting.names.index(name) + 1}." if name in acting.names else "no"
    strength = _spelled(acting.strengths.get(name))
    return name, variant, _ranks(present.values()) or "–", len(present), f"{_trained(model, name):,}", place, strength


def _ranks(targets: Iterable[Target | None]) -> str:
    found = sorted({one.cfg.r for one in targets if one is not None and isinstance(one.cfg, RankConfig)})
    return "–".join(str(r) for r in dict.fromkeys((*found[:1], *found[-1:])))


def _trained(model: nn.Module, name: str) -> int:
    """How many numbers are trained."""
    present = present_targets(model, name).values()
    targets = [target for target in present if target is not None]
    tensors = [tensor for target in targets for tensor in target.params_on(target.layer).values()]
    tensors += current(model, record_of(model, name)).values() if len(targets) == len(present) else []
    return sum(t.numel() for t in {*tensors} if isinstance(t, nn.Parameter) and t.requires_grad)


def _spelled(strength: Tensor | None) -> str:
    if strength is None:
        return "1"
    return f"{float(strength):g}" if strength.dim() == 0 else f"one for each of {len(strength)} rows"
