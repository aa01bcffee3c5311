"""Block rotations of singular coordinates, for AntiPaSTO."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lora_lite_core import ConfigError, cayley_offset, remembered, skew

CHOICES = {"rotate_basis": ("V", "U", "both", "none"), "select": ("s", "rms", "mean_abs")}


def check_rotations(cfg: Any) -> None:
    """Raise ConfigError for an unknown choice, or where block_size, a rank or max_rotation_angle make no rotation."""
    name = type(cfg).__name__
    for field, allowed in CHOICES.items():
        if getattr(cfg, field) not in allowed:
            raise ConfigError(f"{name}({field}={getattr(cfg, field)!r}): give one of {', '.join(allowed)}")
    if cfg.block_size < 2:
        raise ConfigError(f"{name}(block_size={cfg.block_size!r}): a rotation needs at least 2")
    for r in (cfg.r, *cfg.rank_pattern.values()):
        if r % cfg.block_size:
            raise ConfigError(f"{name}(r={r}) is not a multiple of block_size={cfg.block_size}")
    if not 0 < cfg.max_rotation_angle < math.pi:
        raise ConfigError(f"{name}(max_rotation_angle={cfg.max_rotation_angle!r}): give an angle above 0 and below π")


def whole_offset(X: Tensor, r: int, full: torch.dtype) -> Tensor:
    """R − I (r, r) of the rotation of all coordinates, from the upper triangle X (r(r−1)/2,) of a skew matrix."""
    return cayley_offset(skew(X.to(full), r))


def block_offset(T: Tensor, cfg: Any, x: Tensor) -> Tensor:
    """R − I of each block (n, b, b) from its parameters T (n, b(b−1)/2), in at least float32; exactly zero at T = 0.

    Entries of X are ½ L tanh(T / 2L), L = 2 tan(θ/2): half a radian of rotation per unit of T near zero.
    """
    limit = 2 * math.tan(cfg.max_rotation_angle / 2)
    with torch.autocast(x.device.type, enabled=False):
        return remembered(_offset, T, limit, cfg.block_size, torch.promote_types(x.dtype, torch.float32))


def _offset(T: Tensor, limit: float, b: int, full: torch.dtype) -> Tensor:
    return cayley_offset(skew(0.5 * limit * torch.tanh(T.to(full) / (2 * limit)), b))


def rotate(offset: Tensor, h: Tensor) -> Tensor:
    """(R − I) h for blocks (n, b, b) and coordinates (..., n·b)."""
    blocks = h.unflatten(-1, offset.shape[:2])
    return torch.einsum("...nb,nab->...na", blocks, offset.to(h.dtype)).flatten(-2)
