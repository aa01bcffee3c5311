"""Who is timed: each variant, its twins in other libraries, and the frozen model; and the sizes of it all."""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import lora_lite_core as ll
from lora_lite_core.contract.text import plain

from ..runs.methods import attach

Result = TypeVar("Result")
FROZEN = "frozen"
PEERS = ("peft", "lycoris")
LYCORIS = {"lora": "locon", "loha": "loha", "lokr": "lokr"}  # our name of a method, and LyCORIS'


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. The model is a Llama without its head: `layers` blocks of seven linear layers."""

    hidden: int = 512
    rank: int = 32
    layers: int = 2
    batch: int = 4
    length: int = 128
    rounds: int = 15
    device: str = "cpu"
    dtype: str = "float32"

    def with_(self, **changes: Any) -> Settings:
        return replace(self, **changes)

    @property
    def place(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": getattr(torch, self.dtype)}


@dataclass(frozen=True)
class Case:
    """One row: a variant with these fields, held against the row called `reference` beside its twins."""

    label: str
    variant: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    reference: str = "lora"

    def config(self, settings: Settings) -> ll.AdapterConfig:
        Config = ll.get_variant(self.variant).Config
        rank: dict[str, Any] = {"r": settings.rank} if issubclass(Config, ll.RankConfig) else {}
        return Config(**{**rank, **self.fields})


def cases(variants: list[str], settings: Settings) -> list[Case]:
    """The rows for these variants: LoRA always, as the reference; DeLoRA in both its forms; AntiPaSTO at half the
    model's width, its own default being wide too, against LoRA of that rank."""
    wide = {"r": max(4, settings.hidden // 2)}
    rows = [Case("lora", "lora")]
    for name in variants:
        if name == "delora":
            rows += [Case("delora", name), Case("delora, zero B", name, {"frozen_copy": False})]
        elif name == "antipasto":
            label = f"lora r={wide['r']}"
            rows += [Case(label, "lora", wide), Case(f"antipasto r={wide['r']}", name, wide, label)]
        elif name != "lora":
            rows.append(Case(name, name))
    return rows


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the linear layers' names."""
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})


def calibration(settings: Settings, width: int, argument: str) -> list[dict[str, Tensor]]:
    """Enough tokens for any rank, of random embeddings, for the model's argument of that name."""
    shape = (settings.batch, max(settings.length, width), width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return [{argument: x.to(**settings.place)}]


Build = Callable[[nn.Module], nn.Module]


def builders(rows: list[Case], settings: Settings, base: nn.Module, data: Any) -> dict[str, Build]:
    """What makes each contestant of a copy of `base`, by name: FROZEN, "<label>", "<label> in peft" …"""
    names = linear_names(base)
    build: dict[str, Build] = {FROZEN: lambda model: model}
    for case in rows:
        cfg = case.config(settings)
        build[case.label] = lambda model, cfg=cfg: attach_ours(model, cfg, data)
        if (config := peft_config(cfg, base, names, data)) is not None:
            build[theirs(case.label, "peft")] = lambda model, config=config: attach_theirs(model, config)
        if (lycoris := lycoris_twin(cfg)) is not None:
            build[theirs(case.label, "lycoris")] = lycoris
    return build


def attempted(passes: Mapping[str, Callable[[], Result]], failed: dict[str, str]) -> dict[str, Result]:
    """What the passes give, by name; of one that raises, `failed` is told why: the others are timed without it."""
    found: dict[str, Result] = {}
    for name, action in passes.items():
        try:
            found[name] = action()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {plain(str(error).strip().partition(chr(10))[0], 200)}"
    return found


def theirs(label: str, peer: str) -> str:
    return f"{label} in {peer}"


def peft_config(cfg: ll.AdapterConfig, model: nn.Module, names: list[str], calibration: Any = None) -> Any:
    """peft's config of the method that `cfg` sets, on the modules of `model` called `names`; None where peft has no
    such method.

    It is what the adapter would be exported as. Exceptions: EVA and PiSSA are peft's own starts (EVA's, from data, is
    timed apart), and DeLoRA with frozen copies is compared with the one form that peft has.
    """
    import peft

    own: dict[str, Callable[[Any], Any]] = {
        "lora": lambda c: peft.LoraConfig(**_lora(c)),
        "eva": lambda c: peft.LoraConfig(**_lora(c)),
        "pissa": lambda c: peft.LoraConfig(**_lora(c), init_lora_weights="pissa"),
        "delora": lambda c: peft.DeloraConfig(r=c.r, delora_lambda=c.lambda0),
    }
    variant = ll.get_variant(cfg.variant)
    if cfg.variant in own:
        config = own[cfg.variant](cfg)
    elif variant.to_peft is None:
        return None
    else:
        config = _exported(cfg, model, calibration)
    if config is not None:
        config.target_modules = set(names)
    return config


def _lora(cfg: Any) -> dict[str, Any]:
    return {"r": cfg.r, "lora_alpha": cfg.r if cfg.alpha is None else cfg.alpha}


def _exported(cfg: ll.AdapterConfig, model: nn.Module, calibration: Any) -> Any:
    """The config of the folder that export_peft writes; None where peft has not this form of the method."""
    import peft

    adapted = attach_ours(copy.deepcopy(model), cfg, calibration)
    with tempfile.TemporaryDirectory() as place:
        try:
            ll.export_peft(adapted, Path(place) / "exported")
        except ll.MergeError:
            return None
        config = peft.PeftConfig.from_pretrained(str(Path(place) / "exported"))
    config.inference_mode = False
    return config


def attach_ours(model: nn.Module, cfg: ll.AdapterConfig, calibration: Any, name: str = "default") -> nn.Module:
    attach(model, cfg, 0, calibration, name)
    return model


@contextmanager
def old_names() -> Generator[None]:
    """peft asks transformers for things by old names, and is told so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def attach_theirs(model: nn.Module, config: Any) -> nn.Module:
    import peft

    with old_names():
        return peft.get_peft_model(model, copy.deepcopy(config))  # type: ignore[arg-type]


def has_lycoris() -> bool:
    return importlib.util.find_spec("lycoris") is not None


def lycoris_twin(cfg: Any) -> Callable[[nn.Module], nn.Module] | None:
    """What puts LyCORIS' adapters of the same method and rank on all linear layers of a model; None where LyCORIS has
    no such method, or is not installed (pip install lycoris-lora)."""
    if cfg.variant not in LYCORIS or not has_lycoris():
        return None
    from lycoris.wrapper import LycorisNetwork  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]

    alpha = _lora(cfg)["lora_alpha"]

    def put_on(model: nn.Module) -> nn.Module:
        LycorisNetwork.apply_preset({"target_module": ["Linear"], "target_name": []})
        logging.getLogger("LyCORIS").setLevel(logging.WARNING)  # it tells of every module
        network = LycorisNetwork(model, lora_dim=cfg.r, alpha=alpha, network_module=LYCORIS[cfg.variant])
        network.apply_to()
        model.add_module("lycoris", network)
        return model

    return put_on
