"""Coverage: which layers a model really calls, and which share of its weights adapters can act on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..attached.records import records_of
from ..attached.targeting import linear_layers
from ..contract.errors import listed
from ..contract.text import count
from ..layers.dry_run import called_layers
from ..layers.layer_kinds import target_sizes


@dataclass(frozen=True)
class Coverage:
    """What `coverage` saw: names of targets, and numbers of weights.

    fired     targets that were called in the run
    silent    targets that were not: their adapter does nothing in it
    reached   weights of the linear layers that were called, adapted or not: what adapters could act on
    total     all weights of the base
    beyond    parameters out of reach, by name, the largest first
    """

    fired: tuple[str, ...]
    silent: tuple[str, ...]
    reached: int
    total: int
    beyond: dict[str, int]

    @property
    def share(self) -> float:
        """reached / total."""
        return self.reached / max(self.total, 1)

    def __repr__(self) -> str:
        never = f"; never called: {listed(self.silent)}" if self.silent else ""
        largest = listed([f"{name} {size:,}" for name, size in self.beyond.items()], 3)
        return (
            f"<Coverage: {len(self.fired)} of {count(len(self.fired) + len(self.silent), 'target')} called{never}; "
            f"adapters can reach {self.share:.1%} of {self.total:,} weights; out of reach: {largest}>"
        )


def coverage(model: nn.Module, *args: Any, **inputs: Any) -> Coverage:
    """Run a twin of the model on these inputs without computing, and report which layers were called.

    The targets are the adapted layers, or all linear layers when there is no adapter. The twin has the model's hooks
    and runs in eval mode under FakeTensorMode; a model that looks at values (as expert routing does) is run for real
    under no_grad instead, and then layers count as silent that these inputs did not reach. Nothing of the model, the
    inputs and torch's random numbers is changed; what forward keeps elsewhere (globals, an lru_cache, a recorder that a
    hook fills) is not the model's. Raises ModelStateError for a model whose class forbids copies.
    """
    adapters = records_of(model).adapters.values()
    targets = dict.fromkeys(name for record in adapters for name in record.layers)
    linear = linear_layers(model)
    linear |= {name: model.get_submodule(name) for name in targets if name not in linear}  # convolutions
    called = called_layers(model, linear, args, inputs)
    sizes = {name: _size(layer) for name, layer in linear.items()}
    held = {id(p) for name in linear for p in linear[name].parameters()}
    beyond = {name: sizes[name] for name in linear if name not in called}
    for name, p in model.named_parameters():
        if not name.rpartition(".")[2].startswith("lora_") and id(p) not in held:
            beyond[name] = p.numel()
    reached = sum(sizes[name] for name in linear if name in called)
    return Coverage(
        tuple(name for name in targets or linear if name in called),
        tuple(name for name in targets or linear if name not in called),
        reached,
        reached + sum(beyond.values()),
        dict(sorted(beyond.items(), key=lambda item: -item[1])),
    )


def _size(layer: nn.Module) -> int:
    """Weights of a linear layer whatever way they are stored."""
    d_in, d_out = target_sizes(layer) or (0, 0)
    return d_in * d_out + (d_out if getattr(layer, "bias", None) is not None else 0)
