"""lora-lite: PyTorch adapters as plugins. Users import it as `import lora_lite as ll`.

Names are resolved on first use, so that importing this package imports neither torch nor any plugin.
"""

# pyright: reportUnusedImport=false
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import Adapter, adapters, attach, detach, disabled
    from .adapter_file import AdapterFile, inspect
    from .calibrate import calibration_batches, run_batch
    from .config import AdapterConfig, LowRankConfig, RankConfig
    from .dry_run import Coverage, coverage
    from .errors import (
        AdapterFileError,
        AdapterNameError,
        AmbiguousVariant,
        BaseMismatch,
        BrokenPlugin,
        CalibrationError,
        ConfigError,
        LoraLiteError,
        MergeError,
        MissingPlugin,
        ModelStateError,
        TargetError,
        UnknownVariant,
        UnsupportedLayer,
    )
    from .exchange import export_peft, import_peft
    from .export import export_lora
    from .files import load, save
    from .hookspecs import CONTRACT_VERSION, hookimpl
    from .install import Target
    from .layers import base_forward, dense_weight, layer_dtype, sketch
    from .lowrank import cayley_offset, lowrank_delta, skew, truncated_svd
    from .merging import merge, merged
    from .optim import param_groups
    from .packing import prepare
    from .registry import LoraLiteConfig, get_variant, list_variants, register, unregister
    from .spec import ParamSpec

_MODULES = {
    "adapter": ("Adapter", "adapters", "attach", "detach", "disabled"),
    "adapter_file": ("AdapterFile", "inspect"),
    "calibrate": ("calibration_batches", "run_batch"),
    "config": ("AdapterConfig", "LowRankConfig", "RankConfig"),
    "dry_run": ("Coverage", "coverage"),
    "errors": (
        "AdapterFileError",
        "AdapterNameError",
        "AmbiguousVariant",
        "BaseMismatch",
        "BrokenPlugin",
        "CalibrationError",
        "ConfigError",
        "LoraLiteError",
        "MergeError",
        "MissingPlugin",
        "ModelStateError",
        "TargetError",
        "UnknownVariant",
        "UnsupportedLayer",
    ),
    "exchange": ("export_peft", "import_peft"),
    "export": ("export_lora",),
    "files": ("load", "save"),
    "hookspecs": ("CONTRACT_VERSION", "hookimpl"),
    "install": ("Target",),
    "layers": ("base_forward", "dense_weight", "layer_dtype", "sketch"),
    "lowrank": ("cayley_offset", "lowrank_delta", "skew", "truncated_svd"),
    "merging": ("merge", "merged"),
    "optim": ("param_groups",),
    "packing": ("prepare",),
    "registry": ("LoraLiteConfig", "get_variant", "list_variants", "register", "unregister"),
    "spec": ("ParamSpec",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name == "__version__":
        from importlib_metadata import version

        globals()[name] = version("lora-lite-core")
        return globals()[name]
    if name.endswith("Config") and name[0].isupper():
        from .registry import config_class

        return config_class(name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    from .listing import config_names
    from .registry import list_variants

    return sorted({*__all__, "__version__", *config_names(list_variants())})
