"""Coverage: which layers a model really calls, and which share of its weights adapters can act on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attached.records import records_of
from ..attached.targets.places import Place, places
from ..contract.errors import listed
from ..contract.text import count
from ..layers.dry_run import called_layers
from ..layers.kinds.experts import bias_name


@dataclass(frozen=True)
class Coverage:
    """What `coverage` saw: names of targets, and numbers of weights.

    fired     targets that were called in the run
    silent    targets that were not: their adapter does nothing in it
    reached   weights of the linear layers that were called, adapted or not: what adapters could act on
    total     all weights of the base
    beyond    parameters out of reach, by name, the largest first
    others    what adapters could be put on by name beside linear layers, and of which kind: "convolution", "embedding",
              "experts"; their weights are beyond reach until they are adapted
    """

    fired: tuple[str, ...]
    silent: tuple[str, ...]
    reached: int
    total: int
    beyond: dict[str, int]
    others: dict[str, str]

    @property
    def share(self) -> float:
        """reached / total."""
        return self.reached / max(self.total, 1)

    def __repr__(self) -> str:
        never = f"; never called: {listed(self.silent)}" if self.silent else ""
        largest = listed([f"{name} {size:,}" for name, size in self.beyond.items()], 3)
        kinds = [f"{name} ({kind})" for name, kind in self.others.items()]
        more = f"; by name also: {listed(kinds, 3)}" if kinds else ""
        return (
            f"<Coverage: {len(self.fired)} of {count(len(self.fired) + len(self.silent), 'target')} called{never}; "
            f"adapters can reach {self.share:.1%} of {self.total:,} weights; out of reach: {largest}{more}>"
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
    found = dict(places(model))
    linear = {name: place.layer for name, place in found.items() if place.kind == "linear" or name in targets}
    linear |= {name: model.get_submodule(name) for name in targets if name not in linear}  # blocks
    called = called_layers(model, linear, args, inputs)
    sizes = {name: _size(found[name]) if name in found else 0 for name in linear}
    held = {id(p) for name in linear if name in found for p in _weights(found[name])}
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
        {name: place.kind for name, place in found.items() if name not in linear},
    )


def _size(place: Place) -> int:
    """Weights of a layer whatever way they are stored."""
    bias = bias_name(place.layer, place.part) if place.part else getattr(place.layer, "bias", None) is not None
    return max(1, place.experts) * (place.d_in * place.d_out + (place.d_out if bias else 0))


def _weights(place: Place) -> Iterator[Tensor]:
    """The parameters that hold them."""
    names = {place.part, bias_name(place.layer, place.part)} if place.part else None
    for name, parameter in place.layer.named_parameters():
        if names is None or name in names:
            yield parameter
