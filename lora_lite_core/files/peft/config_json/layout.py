"""What every folder in PEFT's layout says of an adapter's modules, and what it cannot say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....attached.records import Record
from ....contract.errors import AdapterFileError, MergeError, listed
from ....contract.target import Target
from ....layers.convolution import is_convolution
from ....layers.layer_kinds import is_conv1d
from .selection import Selection, endings


def layout_fields(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Any]:
    """The modules' endings, and whether weights are stored transposed. Where only some are, PEFT corrects the field for
    each of the others, with a warning."""
    stored = {"fan_in_fan_out": True} if any(is_conv1d(target.layer) for target in targets.values()) else {}
    return {"target_modules": suffix_targets(model, targets), **stored}  # not every method has the second field


def suffix_targets(model: nn.Module, targets: Collection[str]) -> list[str]:
    """The shortest endings of dotted names that select these modules and no other, as PEFT and servers read them."""
    modules = [(path, id(module)) for path, module in model.named_modules(remove_duplicate=False) if path]
    wanted = set(targets)
    adapted = {key: path for path, key in modules if path in wanted}
    for path, key in modules:
        if path not in wanted and key in adapted:
            raise MergeError(f"{path} is the same layer as {adapted[key]}, and PEFT would adapt one of the two alone")
    others = Counter(end for path, _ in modules if path not in wanted for end in endings(path))
    chosen: dict[str, None] = {}
    for target in targets:
        ending = next((end for end in reversed([*endings(target)]) if end not in others), None)
        if ending is None:
            other = next(path for path, _ in modules if path not in wanted and path.endswith("." + target))
            raise MergeError(
                f"PEFT selects modules by the end of their names, and '{target}' is also the end of '{other}', "
                "which is not adapted; adapt both, or rename one"
            )
        chosen[ending] = None
    return list(chosen)


def check_read_back(model: nn.Module, config: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise MergeError unless PEFT finds in this config the modules in `own`, each with its own fields."""
    selection = Selection(config, model)
    try:
        wrong = selection.adapted() ^ set(own)
        found = {path: selection.own(path) for path in own}
    except AdapterFileError as error:
        raise MergeError(f"PEFT's config cannot tell these modules apart: {error}") from error
    wrong |= {path for path, fields in own.items() if any(found[path][key] != fields[key] for key in fields)}
    if wrong:
        raise MergeError(f"PEFT's config cannot tell these modules from others: {listed(sorted(wrong), 4)}")


def check_endings(model: nn.Module, whole: Collection[str], field: str) -> None:
    """PEFT takes every module whose name ends so, also in the middle of a word."""
    for path, _ in model.named_modules():
        for name in whole:
            if path.endswith(name) and not any(path == one or path.startswith(f"{one}.") for one in whole):
                raise MergeError(f"PEFT's {field} would take '{path}' for '{name}', too; it cannot tell them apart")


def refuse_whole_modules(record: Record) -> None:
    """A LoRA folder that servers read holds low-rank factors alone."""
    if record.whole:
        raise MergeError(
            f"the adapter trains whole modules ({listed(record.whole, 3)}), which servers do not take from such a "
            "folder; export_peft writes them as modules_to_save where PEFT has the method, merge(model) keeps them"
        )


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise MergeError(f"dtype={dtype!r}: an exported adapter is float32, float16 or bfloat16")
    return found


def written_form(layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors as PEFT keeps them: those of a convolution have its kernel's dimensions. MergeError where it is
    not said how."""
    if not is_convolution(layer):
        return dict(tensors)
    if differs := _of_another_convolution(layer):
        raise MergeError(f"{differs}; merge(model) instead")
    kernel, ones = layer.weight.shape[1:], (1,) * len(layer.kernel_size)
    shapes = {
        "lora_A.weight": lambda tensor: (len(tensor), *kernel),
        "lora_B.weight": lambda tensor: (*tensor.shape, *ones),
        "lora_magnitude_vector": lambda tensor: (1, len(tensor), *ones),
    }
    if unknown := [name for name in tensors if name not in shapes]:
        raise MergeError(f"{unknown[0]} of a convolution has no form in PEFT that is known here; merge(model) instead")
    return {name: tensor.reshape(shapes[name](tensor)) for name, tensor in tensors.items()}


def read_form(layer: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """One of a layer's tensors in PEFT's folder as those of a linear layer are; AdapterFileError for a convolution on
    which PEFT's adapter computes something else than it would here."""
    if not is_convolution(layer):
        return tensor
    if differs := _of_another_convolution(layer):
        raise AdapterFileError(f"{name}: {differs}")
    return tensor.flatten() if name.startswith("lora_magnitude") else tensor.flatten(1) if tensor.dim() > 2 else tensor


def _of_another_convolution(layer: Any) -> str:
    if set(layer.dilation) == {1} and layer.padding_mode == "zeros":
        return ""
    return (
        f"a convolution with dilation={layer.dilation} and padding_mode={layer.padding_mode!r}: PEFT's adapters run "
        "without dilation and pad with zeros, so that they compute something else"
    )
