"""What FourierFT and WaveFT share: where their coefficients are, and how PEFT's directories hold them.

Those do not hold the places; they hold the seed that PEFT draws them from, for every layer of a size the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

Pair = tuple[dict[str, Any], dict[str, Tensor]]


def check(cfg: Any) -> None:
    name = type(cfg).__name__
    if not cfg.scaling:
        raise ConfigError(f"{name}(scaling={cfg.scaling!r}): nothing would be trained; a number other than 0")
    if not -(2**63) <= cfg.random_loc_seed < 2**64:
        raise ConfigError(f"{name}(random_loc_seed={cfg.random_loc_seed!r}): a seed has at most 64 bits")


def places(total: int, count: int, seed: int) -> Tensor:
    """Those that PEFT draws for FourierFT and WaveFT, of every layer of a size anew."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]


def _spectrum_to_peft(method: str, params: dict[str, Tensor], cfg: Any, layer: Any, *names: str) -> Pair:
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise MergeError(f"PEFT's {type(cfg).__name__.removesuffix('Config')} takes no {type(layer).__name__}")
    fields = {name: getattr(cfg, name) for name in ("n_frequency", "scaling", "random_loc_seed", *names)}
    return {"peft_type": method.upper(), **fields}, {f"{method}_spectrum": params["lora_spectrum"]}


def _spectrum_from_peft(method: str, config: Any, tensors: dict[str, Tensor], layer: Any, *names: str) -> Pair | None:
    if config["peft_type"] != method.upper():
        return None
    for name in ("n_frequency", "n_frequency_pattern", "proportional_parameters"):  # the spectrum tells
        config.get(name)
    spectrum, total = tensors[f"{method}_spectrum"], layer.weight.numel()
    fields = {name: config[name] for name in ("scaling", "random_loc_seed", *names)}
    where = places(total, len(spectrum), fields["random_loc_seed"])
    return {"n_frequency": len(spectrum), **fields}, {"lora_spectrum": spectrum, "lora_places": where}


def fourier_to_peft(params: dict[str, Tensor], cfg: Any, layer: Any) -> Pair:
    return _spectrum_to_peft("fourierft", params, cfg, layer)


def fourier_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: Any) -> Pair | None:
    return _spectrum_from_peft("fourierft", config, tensors, layer)


def wave_to_peft(params: dict[str, Tensor], cfg: Any, layer: Any) -> Pair:
    return _spectrum_to_peft("waveft", params, cfg, layer, "wavelet_family", "use_idwt")


def wave_from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: Any) -> Pair | None:
    return _spectrum_from_peft("waveft", config, tensors, layer, "wavelet_family", "use_idwt")
