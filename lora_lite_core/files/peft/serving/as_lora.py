"""Any affine adapter as a plain LoRA in PEFT's directory format, which inference servers read."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ....attached.model_checks import GATHER, check_not_sharded
from ....attached.records import check_outside, record_of, targets_of
from ....attached.targets.experts import single
from ....contract.errors import ConfigError, MergeError
from ....weights.probing import READING, adapters_alone
from ..config_json.layout import dtype_of, refuse_whole_modules
from ..folder_writing import checked_folder
from ..tensor_forms.tied_tokens import leaders
from .check_prompt import check_prompt
from .lora_folder import change_of, check_rank, error_by_rank, factors, needed, rank_of, write_lora
from .report import LoRAExport
from .served_names import served_model, served_names

SHOWN_RANKS = (4, 8, 16, 32, 64, 128)


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str = "default",
    tol: float = 1e-5,
    rank: int | None = None,
    dtype: torch.dtype | str = torch.float32,
    served: nn.Module | type[nn.Module] | str | None = None,
    check: bool | Sequence[int] = False,
) -> LoRAExport:
    """Write the adapter as a LoRA that PEFT, transformers, vLLM, SGLang and llama.cpp load.

    directory  a folder; its parent must exist. adapter_config.json, adapter_model.safetensors and lora_lite_export.json
               (what the returned LoRAExport says) are written into it
    tol        largest relative error ‖ΔW − B A‖ / ‖ΔW‖ of a layer; the smallest rank that keeps it is chosen
    rank       this rank instead, whatever the error (it is reported)
    dtype      of the factors: float32, float16 or bfloat16
    served     the class that a server makes of the base (or its name in transformers, or such a model), where it is not
               that of `model`: names are compared with it, and written as it has them
    check      also write a check prompt: token ids and what greedy generation makes of them; True chooses the ids. The
               model must be a causal language model. `verify_export` lets a server's engine generate the same

    ΔW is what the adapter adds to the layer's weight, found by probing, in float64. All layers get one rank, smaller
    ones are padded with zeros; the scale is folded in (lora_alpha = r). The model is not changed. Raises MergeError
    when the change is not affine, shifts the bias, overflows, has full rank while no rank is given (with the error of
    some), or is in layers that the served class lacks, ConfigError for arguments that make no sense, ModelStateError
    where no prompt can be run, AdapterFileError where the folder cannot be written: then it is as before.
    """
    check_rank(rank)
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not tol >= 0:
        raise ConfigError(f"tol={tol!r}: the largest relative error is a number from 0")
    cast = dtype_of(dtype)
    record = record_of(model, name)
    check_not_sharded(model, GATHER)
    check_outside(model, *READING)
    refuse_whole_modules(record)
    folder = checked_folder(directory)
    targets = leaders(targets_of(model, name))
    outer = model if served is None else served_model(served, model)
    names = served_names(model, targets, outer) if served is not None else {path: path for path in targets}
    singles = {path: single(target) for path, target in targets.items()}
    for target in targets.values():
        adapters_alone(target, [name])
    parts = {one.name: factors(change_of(one), tol) for each in singles.values() for one in each}
    size = rank or max(1, *(needed(S, tol) for _, S, _ in parts.values()))
    if rank is None:
        own = {one.name: rank_of(one) for each in singles.values() for one in each}
        _check_low(parts, own, tol, f"'{name}' ({record.variant.name})")
    result = LoRAExport(folder, size, renamed={path: new for path, new in names.items() if path != new})
    if check is not False:
        result.check = check_prompt(model, name, None if check is True else check)
    write_lora(model, outer, targets, parts, result, tol=tol, cast=cast, variant=record.variant.name)
    return result


def _check_low(parts: dict[str, tuple[Tensor, Tensor, Tensor]], own: dict[str, int], tol: float, who: str) -> None:
    """Refuse what would be larger than the weights themselves, unless it is the rank that the layer was given."""
    for path, (U, S, Vh) in parts.items():
        size = needed(S, tol)
        if size > own[path] and size * (len(U) + Vh.shape[1]) > len(U) * Vh.shape[1]:
            most = min(len(U), Vh.shape[1])
            curves = [error_by_rank(S) for _, S, _ in parts.values()]
            table = ", ".join(
                f"{r}: {max(float(left[min(r, len(left) - 1)]) for left in curves):.1g}"
                for r in SHOWN_RANKS
                if r < most
            )
            raise MergeError(
                f"the change that {who} makes needs rank {size} ({path} is {len(U)} × {Vh.shape[1]})\n"
                f"  relative error of the worst layer by rank: {table}\n"
                "  give export_lora(…, rank=…) to accept one of these, or merge(model) and save the model"
            )
