"""What the checks work on: a variant's config, small models to put it on, and data."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attached.adapter import Adapter, attach, detach
from ..contract.config import AdapterConfig
from ..contract.errors import CalibrationError
from ..contract.variant import Hook, Variant
from ..discovery.registry import get_variant
from ..toolbox.training_steps import follow, penalty


class CheckFailed(AssertionError):
    """A promise is broken. The message says which, what was seen, and how to mend it."""


NAMES = ("up", "down", "mix", "pair")  # of the layers of the kit's models


class Net(nn.Module):
    """Layers d → h → d in a residual branch, one of them without a bias, and two d → d on its output; x (..., d).

    only  the name of one layer, to run that alone
    """

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.up = nn.Linear(d, h)
        self.down = nn.Linear(h, d, bias=False)
        self.mix = nn.Linear(d, d)
        self.pair = nn.Linear(d, d)

    def forward(self, x: Tensor, only: str = "") -> Tensor:
        if only:
            return self.get_submodule(only)(x)
        hidden = x + self.down(torch.tanh(self.up(x)))
        return self.mix(hidden) + self.pair(torch.tanh(hidden))


class Block(nn.Module):
    """x (..., d) → (..., d), as a decoder layer is to a variant of blocks."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.inner = nn.Linear(d, d)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Blocks(Net):
    """The same with blocks d → d in the places of layers, for variants that serve no linear layer."""

    def __init__(self, d: int) -> None:
        super().__init__(d, d)
        for name in NAMES:
            setattr(self, name, Block(d))


class Packed(nn.Module):
    """A linear layer whose weight is stored as 8-bit codes and a scale per row, as quantised layers do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (layer.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)  # packed: its shape says nothing
        self.scale: Tensor
        self.register_buffer("scale", scale)
        bias = cast("Tensor | None", layer.bias)  # torch types it as always there
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.train(layer.training)

    def dense(self) -> Tensor:
        return self.weight.reshape(self.out_features, self.in_features) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Subject:
    """A config under test. Its targeting is left aside: it goes on every layer of the kit's own models.

    calibration   batches for variants that need data; made up where None
    identity_tol  largest allowed deviation of a fresh adapter; None is what the variant declares (IDENTITY_ATOL)
    sizes         (d, h) of the models' layers

    A variant that asks whether it is training may draw then: its models are in eval mode, and `training_mode` checks
    the rest.
    """

    def __init__(
        self,
        cfg: AdapterConfig,
        *,
        calibration: Iterable[Any] | None = None,
        identity_tol: float | None = None,
        sizes: tuple[int, int] = (64, 96),
    ) -> None:
        everywhere: dict[str, Any] = {"target_names": (), "exclude_names": (), "target_roles": (), "layers": None}
        known = {field.name for field in fields(cfg)}
        everywhere |= {name: {} for name in ("rank_pattern", "alpha_pattern") if name in known}
        self.given = cfg
        self.variant: Variant = get_variant(cfg.variant)
        self.of_blocks = "linear" not in self.variant.layers
        if self.of_blocks:
            everywhere["target_names"] = (f"^({'|'.join(NAMES)})$",)
        self.cfg = replace(cfg, **everywhere)
        self.calibration = calibration
        self.identity_tol = self.variant.identity_atol if identity_tol is None else identity_tol
        self.sizes = sizes
        self.asks_for_training = self.variant.asks("training")

    @functools.cached_property
    def attaches(self) -> bool:
        """Whether the adapter can be put on a model and run at all; without that no other check says anything."""
        try:
            self.attach_and_run()
        except Exception:
            return False
        return True

    @torch.no_grad()
    def attach_and_run(self) -> None:
        model = self.model()
        self.attach(model)
        model(self.x())
        detach(model)

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
        """A fresh model; the same one for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = Blocks(self.sizes[0]) if self.of_blocks else Net(*self.sizes)
            return made.to(dtype).train(not self.asks_for_training)

    def x(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Inputs of the model, (4, 6, d) by default."""
        made = torch.randn(*(shape or (4, 6)), self.sizes[0], generator=torch.Generator().manual_seed(seed))
        return made.to(dtype)

    def attach(self, model: nn.Module, name: str = "default", seed: int = 0, **changes: Any) -> Adapter:
        """The adapter on every layer, with calibration data if it does not go without."""
        cfg = replace(self.cfg, **changes) if changes else self.cfg
        if self.calibration is None:
            try:
                return attach(model, cfg, name=name, seed=seed)
            except CalibrationError:
                data = [self.x(8, 40, dtype=dtype_of(model), seed=which) for which in range(2)]
                return attach(model, cfg, name=name, seed=seed, calibration_data=data)
        return attach(model, cfg, name=name, seed=seed, calibration_data=self.calibration)

    def trained(self, dtype: torch.dtype = torch.float32, seed: int = 0, name: str = "default") -> tuple[Net, Adapter]:
        """A fresh model with an adapter that three AdamW steps have moved away from the identity."""
        model = self.model(dtype, seed)
        adapter = self.attach(model, name)
        train(self, model, adapter, steps=3)
        return model, adapter


def train(subject: Subject, model: nn.Module, adapter: Adapter, steps: int, lr: float = 1e-2) -> list[float]:
    """Regression onto a fixed rotation of the model's own output; the losses before each step."""
    x = subject.x(dtype=dtype_of(model))
    goal = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    follow(model, optimizer)
    losses = []
    for _ in range(steps):
        loss = (model(x) - goal).float().square().mean()
        (loss + penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the base: an adapter's tensors, which may stand before it, are float32."""
    named = ((name.rpartition(".")[2], p.dtype) for name, p in model.named_parameters() if p.is_floating_point())
    return next(dtype for name, dtype in named if not name.startswith("lora_"))


def hooks_by_hand(s: Subject) -> Iterator[tuple[str, Hook, dict[str, Any]]]:
    """Each layer's name with each of the variant's forwards, and arguments to call it with as the core would."""
    _, adapter = s.trained()
    for name, target in adapter.layers().items():
        layer = target.layer
        x = torch.randn(4, target.d_in, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            y = layer.forward(x)
        params = target.params_on(layer)
        given = {"x": x, "y": y, "params": params, "cfg": target.cfg, "layer": layer, "training": False}
        for hook in (target.variant.forward_input, target.variant.forward):
            if hook is not None:
                yield name, hook, {**given, "context": {"x": s.x()}}


def weights_hash(model: nn.Module) -> str:
    """Of the names and bytes of everything that is not an adapter's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.rpartition(".")[2].startswith("lora_"):
            digest.update(name.encode() + tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def must(condition: bool | Tensor, seen: str) -> None:
    """Raise CheckFailed, saying what was seen, unless the condition holds."""
    if not condition:
        raise CheckFailed(seen)


def close(got: Tensor, expected: Tensor, tolerance: float, seen: str) -> None:
    """`must` be equal up to tolerance × (1 + the largest entry); 0 is bit for bit."""
    must(got.shape == expected.shape, f"{seen}: shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    must(got.dtype == expected.dtype, f"{seen}: dtype {got.dtype}, not {expected.dtype}")
    if got.numel() and not torch.equal(got, expected):
        off = float((got.double() - expected.double()).detach().abs().max())
        limit = tolerance * (1 + float(expected.detach().abs().max()))
        must(off <= limit, f"{seen}: off by {off:.2g}, allowed {limit:.2g}")
