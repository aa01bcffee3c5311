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
from ....contract.target import Target
from ....weights.probing import READING, adapted_map, adapters_alone
from ..config_json.layout import check_read_back, dtype_of, layout_fields, refuse_whole_modules
from ..folder_writing import checked_folder, write_folder
from ..tensor_forms.forms import keys_of, written_form
from ..tensor_forms.tied_tokens import leaders
from .check_prompt import check_prompt
from .report import LayerLoss, LoRAExport
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
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank={rank!r}: a rank is a whole number from 1")
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
    fields = layout_fields(outer, {names[path]: target for path, target in targets.items()})
    singles = {path: single(target) for path, target in targets.items()}
    parts = {one.name: _change(target, one, name, tol) for t, target in targets.items() for one in singles[t]}
    size = rank or max(1, *(_needed(S, tol) for _, S, _ in parts.values()))
    if rank is None:
        own = {one.name: getattr(one.cfg, "r", 0) for each in singles.values() for one in each}
        _check_low(parts, own, tol, f"'{name}' ({record.variant.name})")
    result = LoRAExport(folder, size, renamed={path: new for path, new in names.items() if path != new})
    factors = {path: _written(path, part, size, tol, cast, result) for path, part in parts.items()}
    tensors: dict[str, Tensor] = {}
    keys = keys_of({names[path]: target for path, target in targets.items()})
    for path, target in targets.items():
        made = written_form(target, [factors[one.name] for one in singles[path]])
        tensors |= {f"{keys[names[path]]}{kind}": tensor for kind, tensor in made.items()}
    fields |= {"peft_type": "LORA", "r": size, "lora_alpha": size, "lora_dropout": 0.0, "bias": "none"}
    check_read_back(outer, fields, {names[path]: {"r": size, "lora_alpha": size} for path in targets})
    if check is not False:
        result.check = check_prompt(model, name, None if check is True else check)
    report = {"variant": record.variant.name, **result.to_dict()}
    write_folder(folder, model, {**fields, "use_rslora": False, "init_lora_weights": True}, tensors, report)
    return result


def _written(
    path: str, part: tuple[Tensor, Tensor, Tensor], size: int, tol: float, cast: torch.dtype, result: LoRAExport
) -> dict[str, Tensor]:
    """The factors of one layer in the dtype that is written; what they lose goes into the report."""
    U, S, Vh = part
    root = S[:size].sqrt()
    A, B = (root[:, None] * Vh[:size]).to(cast), (U[:, :size] * root).to(cast)
    if not (A.isfinite().all() and B.isfinite().all()):
        raise MergeError(f"the factors of {path} do not fit {cast}: they overflow; give dtype='float32'")
    off = torch.linalg.matrix_norm((U * S) @ Vh - B.double() @ A.double())
    result.errors[path] = float(off / S.norm()) if S.any() else 0.0
    result.layers[path] = LayerLoss(_needed(S, tol), size, result.errors[path])
    pad = size - len(A)
    padded = nn.functional.pad(A, (0, 0, 0, pad)), nn.functional.pad(B, (0, pad))
    return dict(zip(("lora_A.weight", "lora_B.weight"), padded, strict=True))


@torch.no_grad()
def _change(target: Target, one: Target, name: str, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """ΔW of a layer, or of one of a target's experts, as U S Vh, complete up to a tenth of tol."""
    path = one.name
    adapters_alone(target, [name])
    found = adapted_map(path, one.layer, [one])
    shift, delta = found.bias - found.base_bias, found.weight - found.base_weight
    if float(shift.norm()) > 1e-6 * float(found.base_bias.norm() + delta.norm()):
        raise MergeError(
            f"'{name}' shifts the bias of {path}, which a LoRA cannot; "
            "merge(model) instead, or leave layers with a bias out"
        )
    return _factors(delta, tol)


def _factors(delta: Tensor, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """A singular value decomposition that stops when what is left is small: changes are mostly of low rank."""
    size, count = torch.linalg.matrix_norm(delta), 32
    generator = torch.Generator().manual_seed(0)
    while 4 * count <= min(delta.shape):
        draws = torch.randn(delta.shape[1], count, generator=generator, dtype=delta.dtype).to(delta.device)
        Q = torch.linalg.qr(delta @ (delta.T @ torch.linalg.qr(delta @ draws).Q)).Q
        inner = Q.T @ delta
        if torch.linalg.matrix_norm(delta - Q @ inner) <= 0.1 * tol * size:
            U, S, Vh = torch.linalg.svd(inner, full_matrices=False)
            return Q @ U, S, Vh
        count *= 4
    return torch.linalg.svd(delta, full_matrices=False)


def _left(S: Tensor) -> Tensor:
    """The relative error of each rank from 0 on."""
    squares = S.square().flip(0).cumsum(0).flip(0)
    return torch.cat([squares, squares.new_zeros(1)]).sqrt() / S.norm().clamp_min(1e-300)


def _needed(S: Tensor, tol: float) -> int:
    return int((_left(S) > tol).sum())


def _check_low(parts: dict[str, tuple[Tensor, Tensor, Tensor]], own: dict[str, int], tol: float, who: str) -> None:
    """Refuse what would be larger than the weights themselves, unless it is the rank that the layer was given."""
    for path, (U, S, Vh) in parts.items():
        size = _needed(S, tol)
        if size > own[path] and size * (len(U) + Vh.shape[1]) > len(U) * Vh.shape[1]:
            most = min(len(U), Vh.shape[1])
            curves = [_left(S) for _, S, _ in parts.values()]
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
