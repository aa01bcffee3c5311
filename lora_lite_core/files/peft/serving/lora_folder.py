"""Changes of weights as the factors of a LoRA, and the folder that holds them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ....attached.targets.experts import single
from ....contract.errors import ConfigError, MergeError
from ....contract.target import Target
from ....weights.probing import adapted_map
from ..config_json.layout import check_read_back, layout_fields
from ..folder_writing import write_folder
from ..tensor_forms.forms import keys_of, written_form
from .report import LayerLoss, LoRAExport

Factors = tuple[Tensor, Tensor, Tensor]  # U S Vh of ΔW, float64


def check_rank(rank: int | None) -> None:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank={rank!r}: a rank is a whole number from 1")


def rank_of(target: Target) -> int:
    """What its config says; 0 for methods without a rank, and for those that take all there is (r=None)."""
    return getattr(target.cfg, "r", 0) or 0


@torch.no_grad()
def change_of(one: Target, *, inactive: bool = False) -> Tensor:
    """ΔW of a layer, or of one of a target's experts, float64; MergeError where the bias changes as well."""
    found = adapted_map(one.name, one.layer, [one], inactive=inactive)
    shift, delta = found.bias - found.base_bias, found.weight - found.base_weight
    if float(shift.norm()) > 1e-6 * float(found.base_bias.norm() + delta.norm()):
        raise MergeError(
            f"'{one.adapter}' shifts the bias of {one.name}, which a LoRA cannot; "
            "merge(model) instead, or leave layers with a bias out"
        )
    return delta


def write_lora(
    model: nn.Module,
    outer: nn.Module,
    targets: Mapping[str, Target],
    parts: Mapping[str, Factors],
    result: LoRAExport,
    *,
    tol: float,
    cast: torch.dtype,
    variant: str,
) -> None:
    """The changes `parts`, by the names of layers and of single experts, as `result` says: in a folder, of one rank, by
    the names of `outer`. What each layer loses is put into `result`, which is written beside."""
    names = {path: result.renamed.get(path, path) for path in targets}
    there = {names[path]: target for path, target in targets.items()}
    fields = layout_fields(outer, there)
    made = {path: _written(path, part, result, tol, cast) for path, part in parts.items()}
    tensors: dict[str, Tensor] = {}
    keys = keys_of(there)
    for path, target in targets.items():
        form = written_form(target, [made[one.name] for one in single(target)])
        tensors |= {f"{keys[names[path]]}{kind}": tensor for kind, tensor in form.items()}
    size = result.rank
    fields |= {"peft_type": "LORA", "r": size, "lora_alpha": size, "lora_dropout": 0.0, "bias": "none"}
    check_read_back(outer, fields, {name: {"r": size, "lora_alpha": size} for name in there})
    fields |= {"use_rslora": False, "init_lora_weights": True}
    write_folder(result.directory, model, fields, tensors, {"variant": variant, **result.to_dict()})


def _written(path: str, part: Factors, result: LoRAExport, tol: float, cast: torch.dtype) -> dict[str, Tensor]:
    """The factors of one layer in the dtype that is written; what they lose goes into the report."""
    (U, S, Vh), size = part, result.rank
    root = S[:size].sqrt()
    A, B = (root[:, None] * Vh[:size]).to(cast), (U[:, :size] * root).to(cast)
    if not (A.isfinite().all() and B.isfinite().all()):
        raise MergeError(f"the factors of {path} do not fit {cast}: they overflow; give dtype='float32'")
    off = torch.linalg.matrix_norm((U * S) @ Vh - B.double() @ A.double())
    result.errors[path] = float(off / S.norm()) if S.any() else 0.0
    result.layers[path] = LayerLoss(needed(S, tol), size, result.errors[path])
    pad = size - len(A)
    padded = nn.functional.pad(A, (0, 0, 0, pad)), nn.functional.pad(B, (0, pad))
    return dict(zip(("lora_A.weight", "lora_B.weight"), padded, strict=True))


def factors(delta: Tensor, tol: float) -> Factors:
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


def error_by_rank(S: Tensor) -> Tensor:
    """The relative error of each rank from 0 on."""
    squares = S.square().flip(0).cumsum(0).flip(0)
    return torch.cat([squares, squares.new_zeros(1)]).sqrt() / S.norm().clamp_min(1e-300)


def needed(S: Tensor, tol: float) -> int:
    return int((error_by_rank(S) > tol).sum())
