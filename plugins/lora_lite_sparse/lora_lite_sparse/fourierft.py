"""FourierFT: few entries of the change's two-dimensional spectrum are trained.

    y = W x + b + s · Re(ifft2(F)) x,   F (d_out, d_in) zero but for n_frequency real entries

The entries' places (row · d_in + column of F) are random, the same for all layers of a size, and drawn from
random_loc_seed as the peft package draws them, so that its folders, which do not hold them, are read. The values are
trained from zero, which makes step 0 the identity. The published start, PEFT's default, is N(0, 1): there the model is
another one from the beginning (a folder of PEFT is read as it is). Needs nothing of the base. n_frequency parameters.
As F is real, half of the spectrum is enough: it is made Hermitian and transformed by irfft2, in float32 at least.
O(d_in d_out log(d_in d_out)) per call and d_in d_out multiply-accumulates per token.

Gao, Wang, Chen, Liu, Wu, Chen, Li: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, 2024 (ICML),
arXiv:2405.03003.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, TargetError, hookimpl, project

from . import _spectra

BENCH = {"lr": 5e-2}
LAYERS = ("linear", "convolution", "experts")


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(AdapterConfig):
    """Config of FourierFT.

    n_frequency      how many entries of each layer's spectrum are trained
    scaling          s
    random_loc_seed  which ones they are
    """

    variant = "fourierft"

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n_frequency, int) or self.n_frequency < 1:
            raise ConfigError(f"FourierFTConfig(n_frequency={self.n_frequency!r}): a whole number of at least 1")
        for name, kinds in (("scaling", (int, float)), ("random_loc_seed", int)):
            if not isinstance(value := getattr(self, name), kinds):
                raise ConfigError(f"FourierFTConfig({name}={value!r}): a{' whole' * (kinds is int)} number")
        _spectra.check(self)


Config = FourierFTConfig
to_peft, from_peft = hookimpl(_spectra.fourier_to_peft), hookimpl(_spectra.fourier_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: FourierFTConfig) -> dict[str, ParamSpec]:
    if cfg.n_frequency > d_in * d_out:
        raise TargetError(
            f"FourierFTConfig(n_frequency={cfg.n_frequency}) on a layer {d_in} → {d_out}: at most {d_in * d_out}"
        )

    def choose(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(_spectra.places(d_in * d_out, len(tensor), cfg.random_loc_seed))

    places = ParamSpec(
        (cfg.n_frequency,), choose, trainable=False, dtype=torch.int64, shared=f"places_of_{d_in * d_out}"
    )
    return {"lora_places": places, "lora_spectrum": ParamSpec((cfg.n_frequency,), doc="the entries' values")}


def _change(spectrum: Tensor, places: Tensor, d_out: int, d_in: int) -> Tensor:
    """Re(ifft2(F)), by the half of F's Hermitian part that irfft2 takes."""
    row, column = places // d_in, places % d_in
    half = spectrum.new_zeros(d_out * (d_in // 2 + 1))
    for u, v in ((row, column), (-row % d_out, -column % d_in)):
        inside = v <= d_in // 2
        place = torch.where(inside, u * (d_in // 2 + 1) + v, 0)
        half.index_add_(0, place, torch.where(inside, spectrum / 2, 0))
    return torch.fft.irfft2(half.view(d_out, -1), s=(d_out, d_in))


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: FourierFTConfig) -> Tensor:
    spectrum = params["lora_spectrum"].to(torch.promote_types(params["lora_spectrum"].dtype, torch.float32))
    change = _change(spectrum * cfg.scaling, params["lora_places"], y.shape[-1], x.shape[-1])
    return project(x, change).to(y.dtype).add_(y)
