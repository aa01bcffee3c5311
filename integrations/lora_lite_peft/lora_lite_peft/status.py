"""What PEFT's `get_layer_status` and `get_model_status` look at: one module beside each adapted layer's place."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import lora_lite_core as ll
from lora_lite_core import Target
from lora_lite_core.attached.records import present_targets, records_of


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """Tells PEFT what is on a layer. It holds no tensor, and reads everything off the model when it is asked."""

    def __init__(self, model: nn.Module, path: str, trained: Mapping[str, frozenset[str]]) -> None:
        super().__init__()
        self._at = (model, path, trained)  # in a tuple, or the model would be a child of it

    @property
    def targets(self) -> dict[str, Target]:
        """The layer's adapters by name."""
        model, path, trained = self._at
        found = {name: present_targets(model, name).get(path) for name in trained if name in ll.adapters(model)}
        return {name: target for name, target in found.items() if target is not None}

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The trained tensors' bare names; each is an attribute, a ParameterDict by adapter."""
        return tuple(dict.fromkeys(bare for one in self.targets.values() for bare in self._trained_of(one)))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("lora_"):
            return super().__getattr__(name)
        held = {adapter: self._trained_of(one).get(name) for adapter, one in self.targets.items()}
        return nn.ParameterDict({adapter: one for adapter, one in held.items() if one is not None})

    @property
    def disable_adapters(self) -> bool:
        return any(block.kind == "disabled" for block in records_of(self._at[0]).blocks)

    @property
    def active_adapter(self) -> list[str]:
        """Of the model, as with PEFT's own: also on a layer that has another."""
        return [name for name in records_of(self._at[0]).lasting if name in self._at[2]]

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        return [name for name, target in self.targets.items() if target.folded]

    @property
    def quantization_backend(self) -> Any:  # type: ignore[override]
        storage = next((target.storage for target in self.targets.values()), "dense")
        return None if storage == "dense" else SimpleNamespace(backend_name=storage)

    def _trained_of(self, target: Target) -> dict[str, nn.Parameter]:
        """What is trained whenever the adapter is."""
        keys = self._at[2].get(target.adapter, ())
        params = target.params.items()
        return {bare: one for bare, one in params if f"{target.name}.{bare}" in keys and isinstance(one, nn.Parameter)}

    def _get_available_adapters(self) -> set[str]:
        return set(self.targets)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            "lora-lite switches, merges and deletes adapters of a whole model: call the PeftModel"
        )

    enable_adapters = set_adapter = delete_adapter = set_requires_grad = merge = unmerge = _refuse

    def __repr__(self) -> str:
        targets = self.targets
        layer = next((type(target.layer).__name__ for target in targets.values()), "no layer")
        return f"{'+'.join(dict.fromkeys(target.variant.name for target in targets.values()))}.{layer}()"


class AdaptedLayers(nn.Module):
    """A tree of modules with an AdaptedLayer in the place of every layer that carries an adapter."""

    def __repr__(self) -> str:
        return f"({sum(isinstance(module, AdaptedLayer) for module in self.modules())} layers)"


def adapted_layers(model: nn.Module, trained: Mapping[str, frozenset[str]]) -> AdaptedLayers:
    """That tree for these adapters, which are given with the names of what they train."""
    tree = AdaptedLayers()
    for path in dict.fromkeys(path for name in trained for path in ll.adapters(model)[name].targets):
        place = tree
        for part in path.split("."):
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]
            assert place is not None
        parent, _, last = path.rpartition(".")
        tree.get_submodule(parent)._modules[last] = AdaptedLayer(model, path, trained)
    return tree
