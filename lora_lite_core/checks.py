"""What is looked at before a model is touched: its state, the config's variant, the calibration data."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .config import AdapterConfig
from .contract import Variant
from .errors import CalibrationError, ConfigError, ModelStateError
from .layers import layer_device
from .registry import get_variant
from .targets import Found, check_layer

ORDER = "the order is: load the base, attach, shard (FSDP2, DDP), compile"


def check_attachable(model: nn.Module) -> None:
    """Raise ModelStateError when hooks put on now would be ignored or their gradients lost."""
    if not isinstance(model, nn.Module):
        raise ModelStateError(f"attach takes an nn.Module, not {type(model).__name__}")
    if torch.is_inference_mode_enabled():
        raise ModelStateError("inside torch.inference_mode() adapters could not be trained; attach outside of it")
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelStateError(f"{where} is compiled, and compiled code ignores hooks that come later; {ORDER}")
        if type(module).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            raise ModelStateError(
                f"{where} wraps the model already, and gradients of adapters would not be reduced; {ORDER}"
            )
    distributed_tensor = sys.modules.get("torch.distributed.tensor")  # not imported: then nothing is sharded
    if distributed_tensor is not None:
        for name, parameter in model.named_parameters():
            if isinstance(parameter, distributed_tensor.DTensor):
                raise ModelStateError(
                    f"{name} is sharded (a DTensor of FSDP2 or tensor parallelism), and gradients of adapters "
                    f"would not be reduced; {ORDER}"
                )


def variant_of(cfg: AdapterConfig) -> Variant:
    if not isinstance(cfg, AdapterConfig):
        raise ConfigError(f"attach takes a config such as LoRAConfig(r=8), not {type(cfg).__name__}")
    variant = get_variant(cfg.variant)
    if not isinstance(cfg, variant.Config):
        raise ConfigError(f"variant '{variant.name}' takes {variant.Config.__name__}, not {type(cfg).__name__}")
    return variant


def check_calibration(variant: Variant, data: Any) -> None:
    if data is not None and not variant.takes_calibration:
        raise CalibrationError(f"variant '{variant.name}' takes no calibration data; leave calibration_data out")


def check_has_weights(found: Iterable[Found]) -> None:
    for target in found:
        check_layer(target.name, target.layer)
        if layer_device(target.layer).type == "meta":
            raise ModelStateError(
                f"{target.name} is on the meta device and has no weights yet; load the base model's weights first"
            )
