"""What every folder in PEFT's layout says of an adapter's modules, and what it cannot say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ....attached.records import Record
from ....contract.errors import AdapterFileError, MergeError, listed
from ....contract.target import Target
from ....layers.kinds.layer_kinds import is_conv1d
from .selection import Selection, endings


def layout_fields(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Any]:
    """The modules' endings, and whether weights are stored transposed. Where only some are, PEFT corrects the field for
    each of the others, with a warning."""
    stored = {"fan_in_fan_out": True} if any(is_conv1d(target.layer) for target in targets.values()) else {}
    layers = [path for path, target in targets.items() if not target.part]
    modules = [(path, id(module)) for path, module in model.named_modules(remove_duplicate=False) if path]
    fields = {"target_modules": _endings(modules, layers), **stored}  # not every method has the second field
    if parts := [path for path, target in targets.items() if target.part]:
        parameters = [(path, id(p)) for path, p in model.named_parameters(remove_duplicate=False)]
        fields["target_parameters"] = _endings(parameters, parts)
    return fields


def _endings(modules: Sequence[tuple[str, int]], targets: Collection[str]) -> list[str]:
    """The shortest endings of dotted names that select these modules and no other, as PEFT and servers read them."""
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
