"""WaveFT: few wavelet coefficients of the change are trained.

    y = W x + b + s · idwt2(C) x,   C zero but for n_frequency entries

C (d_out, d_in) holds the four subbands of one level of a two-dimensional wavelet transform, each in its quadrant: the
high-pass one of the outputs' axis top right, of the inputs' bottom left. Its places (row · d_in + column) are random,
the same for all layers of a size, and drawn from random_loc_seed as the peft package draws them, so that its folders,
which do not hold them, are read. The values are trained from zero, which makes step 0 the identity. Needs nothing of
the base. n_frequency parameters. The wavelets are Daubechies' of 2 to 16 taps, "db1" (Haar) to "db8". About 2 taps ·
d_in d_out multiply-accumulates per call and d_in d_out per token.

Bilican, Yılmaz, Tekalp, Cinbiş: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, 2025,
arXiv:2505.12532.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lite_core import AdapterConfig, ConfigError, ParamSpec, TargetError, hookimpl, project

from . import _spectra
from ._wavelets import DAUBECHIES, synthesis

BENCH = {"lr": 5e-4}
LAYERS = ("linear", "convolution", "experts")


@dataclass(frozen=True, kw_only=True)
class WaveFTConfig(AdapterConfig):
    """Config of WaveFT.

    n_frequency      how many coefficients of each layer are trained
    scaling          s
    wavelet_family   "db1" (Haar) to "db8"
    use_idwt         False: the entries of the change itself, without a transform
    random_loc_seed  which ones they are
    """

    variant = "waveft"

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n_frequency, int) or self.n_frequency < 1:
            raise ConfigError(f"WaveFTConfig(n_frequency={self.n_frequency!r}): a whole number of at least 1")
        for name, kinds in (("scaling", (int, float)), ("random_loc_seed", int)):
            if not isinstance(value := getattr(self, name), kinds):
                raise ConfigError(f"WaveFTConfig({name}={value!r}): a{' whole' * (kinds is int)} number")
        _spectra.check(self)
        if self.wavelet_family not in DAUBECHIES:
            known = ", ".join(DAUBECHIES)
            raise ConfigError(f"WaveFTConfig(wavelet_family={self.wavelet_family!r}): the wavelets here are {known}")


Config = WaveFTConfig
to_peft, from_peft = hookimpl(_spectra.wave_to_peft), hookimpl(_spectra.wave_from_peft)


@hookimpl
def param_specs(d_in: int, d_out: int, cfg: WaveFTConfig) -> dict[str, ParamSpec]:
    if cfg.n_frequency > d_in * d_out:
        raise TargetError(
            f"WaveFTConfig(n_frequency={cfg.n_frequency}) on a layer {d_in} → {d_out}: at most {d_in * d_out}"
        )

    def choose(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(_spectra.places(d_in * d_out, len(tensor), cfg.random_loc_seed))

    places = ParamSpec(
        (cfg.n_frequency,), choose, trainable=False, dtype=torch.int64, shared=f"places_of_{d_in * d_out}"
    )
    return {"lora_places": places, "lora_spectrum": ParamSpec((cfg.n_frequency,), doc="the coefficients")}


@hookimpl
def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: WaveFTConfig) -> Tensor:
    spectrum = params["lora_spectrum"].to(torch.promote_types(params["lora_spectrum"].dtype, torch.float32))
    (d_out, d_in), low = (y.shape[-1], x.shape[-1]), DAUBECHIES[cfg.wavelet_family]
    C = spectrum.new_zeros(d_out * d_in).index_add_(0, params["lora_places"], spectrum * cfg.scaling).view(d_out, d_in)
    if cfg.use_idwt:
        more, rows, columns = len(low) - 2, d_out % 2, d_in % 2
        C = F.pad(C, (more // 2, more // 2 + columns, more // 2, more // 2 + rows))
        a, h, v, d = (quarter for part in C.chunk(2) for quarter in part.chunk(2, 1))  # h is high along rows
        top, bottom = synthesis(a, v, low, 1), synthesis(h, d, low, 1)
        C = synthesis(top, bottom, low, 0)[:d_out, :d_in]
    return project(x, C).to(y.dtype).add_(y)
