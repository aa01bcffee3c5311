"""Tensors of the base that PEFT writes beside an adapter: of embeddings and heads that it adapts, or were resized."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ....contract.errors import AdapterFileError, ModelStateError
from ..config_json.fields import first_of
from .starts import BASE, changes_weight

WRAPPED = ".base_layer."
COPIES = ("original_module", "modules_to_save")  # under which bias="all" writes the biases of whole modules once more


def without_copies(tensors: Mapping[str, Tensor], whole: list[str]) -> dict[str, Tensor]:
    """The tensors without those of whole modules that PEFT writes a second time, or as they were before training."""
    before, again = (tuple(f"{path}.{copy}." for path in whole) for copy in COPIES)
    made: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if before and key.startswith(before):
            continue
        if again and key.startswith(again):
            path, _, name = key.partition(f".{COPIES[1]}.")
            first = tensors.get(f"{path}.{name}", tensors.get(f"{path}.{name.partition('.')[2]}"))  # adapter's name
            if first is not None and torch.equal(first, tensor):
                continue
        made[key] = tensor
    return made


def without_base(config: Mapping[str, object], tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors without those of embeddings, and of the head, that are the base's own. Raises AdapterFileError where
    they are another base's."""
    own, again = _of_vocabulary(model), changes_weight(config)
    made: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, held = own.get(key.replace(WRAPPED, ".", 1), (None, None))
        if held is None or (again and key.endswith(f".{BASE}") and not isinstance(module, nn.Embedding)):
            made[key] = tensor  # the adapter's, or the head's less the start, which is made of the weight here
        elif held.device.type == "meta":
            raise ModelStateError(f"{key} is on the meta device; load the base model's weights first")
        elif tensor.shape != held.shape or not torch.equal(tensor.to(held), held):
            raise AdapterFileError(
                f"{first_of([key])} {tuple(tensor.shape)} is not this model's {tuple(held.shape)}: the adapter was "
                "made on another base (resized, with new tokens, or trained); give the base those weights first"
            )
    return made


def _of_vocabulary(model: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """The parameters of embeddings and of the head, by name, with their modules."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None
    return {
        f"{path}.{name}": (module, parameter)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module is head
        for name, parameter in module.named_parameters(recurse=False)
    }
