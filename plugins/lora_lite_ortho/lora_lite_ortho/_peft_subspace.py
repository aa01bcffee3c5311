"""The same as `_peft`, for PSOFT, of which the peft package saves no frozen factor: it makes them anew at load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError, dense_weight

from ._peft import Pair, full, linear_only

VECTORS = {"psoft_R.vector_b": "lora_d", "psoft_R.vector_a": "lora_c"}
ROUNDS = "psoft_svd_lowrank_niter"
FAR = 1e-3  # how far a singular vector may be from PEFT's


def check(cfg: Any) -> None:
    for r in (cfg.r, *cfg.rank_pattern.values()):
        if r < 2 and cfg.orthogonal:
            raise ConfigError(f"PSOFTConfig(r={r}): a rotation needs at least 2 dimensions")
    if isinstance(cfg.dropout, bool) or not isinstance(cfg.dropout, (int, float)) or not 0 <= cfg.dropout < 1:
        raise ConfigError(f"PSOFTConfig(dropout={cfg.dropout!r}): dropout is a number from 0 to below 1")
    if cfg.start not in ("psoft", "pissa"):
        raise ConfigError(f"PSOFTConfig(start={cfg.start!r}): give 'psoft' or 'pissa'")
    if cfg.bound is not None and (not isinstance(cfg.bound, (int, float)) or not cfg.bound > 0):
        raise ConfigError(f"PSOFTConfig(bound={cfg.bound!r}): the largest norm of Q is a number above 0, or None")
    if (cfg.terms is not None and not cfg.orthogonal) or (cfg.bound is not None and cfg.terms is None):
        raise ConfigError("PSOFTConfig: terms is of the rotation (orthogonal=True), bound of the series (terms=5)")


def factors(triplets: tuple[Tensor, ...], start: str) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r)."""
    U, S, Vh = triplets
    return (Vh, U * S) if start == "psoft" else (S.sqrt()[:, None] * Vh, U * S.sqrt())


def _theirs(layer: nn.Module, r: int, config: dict[str, Any]) -> tuple[Tensor, ...]:
    """The triplets that PEFT makes of this weight, with its signs."""
    weight = dense_weight(layer).float()
    backend, seed, rounds = config.get("psoft_svd", "full"), config.get("random_seed", 0), config.get(ROUNDS, 10)
    if backend == "full":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r]
    if backend != "lowrank":
        raise ConfigError(f"psoft_svd={backend!r}: PEFT has 'full' and 'lowrank'")
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(weight, q=r, niter=rounds)
    return U, S, V.T


def _signed(q: Tensor, signs: Tensor, orthogonal: bool) -> Tensor:
    """The upper triangle of Q, or a whole matrix, where singular vectors i have the signs sᵢ: times sᵢ sⱼ."""
    signs = signs.to(q)
    if not orthogonal:
        return signs[:, None] * q * signs
    rows, columns = torch.triu_indices(len(signs), len(signs), 1, device=q.device)
    return q * signs[rows] * signs[columns]


def psoft_to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    linear_only(layer, "PSOFT")
    theirs = _theirs(layer, cfg.r, {})[2]
    overlap = torch.nn.functional.normalize(full(params["lora_A"])) @ theirs.to(full(params["lora_A"])).T
    signs = overlap.diagonal().sign()
    if not float((overlap - torch.diag(signs)).abs().max()) < FAR:
        raise MergeError(
            "PEFT makes the frozen factors of PSOFT anew from the weight, and its singular vectors are not these: they "
            "are of another decomposition, or singular values are equal; export_lora writes the change as a LoRA"
        )
    weight = _signed(full(params["lora_q"]), signs, cfg.orthogonal)
    scales = {name: 1 + full(params[ours]) for name, ours in VECTORS.items() if ours in params}
    fields = {"peft_type": "PSOFT", "r": cfg.r, "psoft_alpha": cfg.r, "psoft_dropout": cfg.dropout}
    fields |= {"ab_svd_init": f"{cfg.start}_init", "psoft_svd": "full", "psoft_orth": cfg.orthogonal}
    fields |= {"psoft_mag_b": cfg.mag_out, "psoft_mag_a": cfg.mag_in, "use_cayley_neumann": cfg.terms is not None}
    series = {} if cfg.terms is None else {"num_cayley_neumann_terms": cfg.terms, "cayley_neumann_eps": cfg.bound}
    weight = weight if cfg.orthogonal else weight + torch.eye(cfg.r, dtype=weight.dtype, device=weight.device)
    return {**fields, **series}, {"psoft_R.weight": weight, **scales}


def psoft_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "PSOFT":
        return None
    orthogonal, series = config.get("psoft_orth", True), bool(config.get("use_cayley_neumann"))
    fields: dict[str, Any] = {"r": config["r"], "dropout": config.get("psoft_dropout") or 0.0, "orthogonal": orthogonal}
    fields |= {"mag_out": config.get("psoft_mag_b", True), "mag_in": config.get("psoft_mag_a", True)}
    fields["start"] = str(config.get("ab_svd_init", "psoft_init")).removesuffix("_init")
    of_series = {"terms": config.get("num_cayley_neumann_terms", 5), "bound": config.get("cayley_neumann_eps")}
    fields |= of_series if series and orthogonal else {}
    config.get("psoft_alpha")  # of which nothing is left
    q = full(tensors["psoft_R.weight"])
    q = q if orthogonal else q - torch.eye(len(q), device=q.device)
    U, S, Vh = _theirs(layer, config["r"], config)
    signs = torch.where(U.gather(0, U.abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0)  # as truncated_svd has them
    A, B = factors((U * signs, S, Vh * signs[:, None]), fields["start"])
    values = {"lora_A": A, "lora_B": B, "lora_q": _signed(q, signs, orthogonal)}
    return fields, values | {ours: full(tensors[name]) - 1 for name, ours in VECTORS.items() if name in tensors}
