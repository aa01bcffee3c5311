"""Any affine adapter as a plain LoRA in PEFT's directory format, which inference servers read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...attached.model_checks import GATHER, check_not_sharded
from ...attached.records import check_outside, record_of, targets_of
from ...attached.targets.experts import single
from ...contract.errors import ConfigError, MergeError, ModelStateError, listed
from ...contract.target import Target
from ...weights.probing import adapted_map, adapters_alone
from .config_json.layout import check_read_back, dtype_of, layout_fields, refuse_whole_modules
from .folder_writing import checked_folder, write_folder
from .tensor_forms.forms import keys_of, written_form
from .tensor_forms.tied_tokens import leaders

SHOWN_RANKS = (4, 8, 16, 32, 64, 128)


@dataclass
class LoRAExport:
    """What `export_lora` has written: the rank of all layers, and each layer's relative error of the change ΔW."""

    directory: Path
    rank: int
    errors: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"<LoRAExport: rank {self.rank}, {len(self.errors)} layers in {self.directory}, "
            f"relative error of ΔW at most {self.errors[worst]:.1e} ({worst})>"
        )


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str = "default",
    tol: float = 1e-5,
    rank: int | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> LoRAExport:
    """Write the adapter as a LoRA that PEFT, transformers, vLLM, SGLang and llama.cpp load.

    directory  a folder; its parent must exist. adapter_config.json and adapter_model.safetensors are written into it
    tol        largest relative error ‖ΔW − B A‖ / ‖ΔW‖ of a layer; the smallest rank that keeps it is chosen
    rank       this rank instead, whatever the error (it is reported)
    dtype      of the factors: float32, float16 or bfloat16

    ΔW is what the adapter adds to the layer's weight, found by probing, in float64. All layers get one rank, smaller
    ones are padded with zeros; the scale is folded in (lora_alpha = r). The model is not changed. Raises MergeError
    when the change is not affine, shifts the bias, overflows, or has full rank while no rank is given (with the error
    of some), AdapterFileError where the folder cannot be written: then it is as before.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank={rank!r}: a rank is a whole number from 1")
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not tol >= 0:
        raise ConfigError(f"tol={tol!r}: the largest relative error is a number from 0")
    cast = dtype_of(dtype)
    record = record_of(model, name)
    check_not_sharded(model, GATHER)
    check_outside(model)
    refuse_whole_modules(record)
    result = LoRAExport(checked_folder(directory), 0)
    targets = leaders(targets_of(model, name))
    fields = layout_fields(model, targets)
    singles = {path: single(target) for path, target in targets.items()}
    parts = {one.name: _change(target, one, name, tol) for t, target in targets.items() for one in singles[t]}
    size = rank or max(1, *(_needed(S, tol) for _, S, _ in parts.values()))
    if rank is None:
        own = {one.name: getattr(one.cfg, "r", 0) for each in singles.values() for one in each}
        _check_low(parts, own, tol, f"'{name}' ({record.variant.name})")
    factors: dict[str, dict[str, Tensor]] = {}
    result.rank = size
    for path, (U, S, Vh) in parts.items():
        root = S[:size].sqrt()
        A, B = (root[:, None] * Vh[:size]).to(cast), (U[:, :size] * root).to(cast)
        if not (A.isfinite().all() and B.isfinite().all()):
            raise MergeError(f"the factors of {path} do not fit {cast}: they overflow; give dtype='float32'")
        off = torch.linalg.matrix_norm((U * S) @ Vh - B.double() @ A.double())
        result.errors[path] = float(off / S.norm()) if S.any() else 0.0
        pad = size - len(A)
        padded = nn.functional.pad(A, (0, 0, 0, pad)), nn.functional.pad(B, (0, pad))
        factors[path] = dict(zip(("lora_A.weight", "lora_B.weight"), padded, strict=True))
    tensors: dict[str, Tensor] = {}
    for path, key in keys_of(targets).items():
        made = written_form(targets[path], [factors[one.name] for one in singles[path]])
        tensors |= {f"{key}{name}": tensor for name, tensor in made.items()}
    fields |= {"peft_type": "LORA", "r": size, "lora_alpha": size, "lora_dropout": 0.0, "bias": "none"}
    check_read_back(model, fields, {path: {"r": size, "lora_alpha": size} for path in targets})
    write_folder(result.directory, model, {**fields, "use_rslora": False, "init_lora_weights": True}, tensors)
    return result


def load_base(base: str) -> nn.Module:
    """A model of the architecture that its config names, by transformers; ModelStateError where that cannot be."""
    try:
        import transformers
    except ImportError as error:
        raise ModelStateError("loading a base model takes transformers; type: pip install transformers") from error
    try:
        config: Any = transformers.AutoConfig.from_pretrained(base)
        kind: Any = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        model, report = kind.from_pretrained(base, dtype="auto", output_loading_info=True)
    except Exception as error:  # whatever transformers, and what it uses, make of a folder
        raise ModelStateError(f"--base {base} cannot be loaded by transformers: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelStateError(f"--base {base} lacks {listed(missing, 4)}, which would be random; give the whole model")
    return model


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
