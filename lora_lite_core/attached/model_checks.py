"""What is looked at before a model is touched: its state, the config's variant, the calibration data."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from ..contract.config import AdapterConfig
from ..contract.errors import BrokenPlugin, CalibrationError, ConfigError, ModelStateError, UnsupportedLayer
from ..contract.target import Target
from ..contract.variant import Variant
from ..discovery.registry import get_variant
from ..layers.kinds.layer_kinds import is_a, is_sharded, is_usual, layer_device, layer_dtype, storage_of
from .records import check_outside
from .targets.targeting import check_layer

Reaction = Literal["error", "warn", "ignore"]  # to an adapter that was made on another base model
WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")
GATHER = "save the adapter, which gathers it, and load base and adapter in one process for this"
ORDER = "the order is: load the base, attach, shard (FSDP2, DDP), compile"


def check_attachable(model: nn.Module, *blocks: str, in_shards: bool = False) -> None:
    """Raise ModelStateError when hooks put on now would be ignored or their gradients lost; `in_shards` for what is
    done to an adapter that FSDP2 has sharded with the model; `blocks`: the with-blocks in the way (none: all)."""
    if not isinstance(model, nn.Module):
        raise ModelStateError(f"attach takes an nn.Module, not {type(model).__name__}")
    check_outside(model, *blocks)
    if torch.is_inference_mode_enabled():
        raise ModelStateError("inside torch.inference_mode() adapters could not be trained; attach outside of it")
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise UnsupportedLayer(
                f"{name or 'the model'} is wrapped by the peft package ({type(module).__name__}), whose own adapters "
                "would be frozen; call unload() or merge_and_unload() on the PEFT model first"
            )
        if problem := "" if in_shards and is_a(module, "FSDPModule") else _wrapped(module):
            raise ModelStateError(f"{name or 'the model'} ({type(module).__name__}) {problem}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        wrapper = torch.nn.parallel.DistributedDataParallel
        if any(issubclass(type(thing), wrapper) and thing.module is model for thing in gc.get_objects()):
            raise ModelStateError(
                f"a DistributedDataParallel holds the model and would not reduce new gradients; {ORDER}"
            )
    if "torch._dynamo" in sys.modules:
        _check_compiled(model)
    if not in_shards:
        check_not_sharded(model, f"gradients of adapters would not be reduced; {ORDER}")


def _wrapped(module: nn.Module) -> str:
    """What was done to a module that adapters have to come before, as the end of a sentence, or ""."""
    kinds = [kind.__name__ for kind in type(module).__mro__]
    if "OptimizedModule" in kinds or getattr(module, "_compiled_call_impl", None) is not None:
        return f"is compiled, and compiled code ignores hooks that come later; {ORDER}"
    if any(kind in WRAPPERS for kind in kinds):
        return f"wraps the model already, and gradients of adapters would not be reduced; {ORDER}"
    return ""


def check_takes_parameters(model: nn.Module) -> None:
    """Raise ModelStateError for a model whose optimizer was prepared already, without the new parameters."""
    if getattr(model, "_is_accelerate_prepared", False):
        raise ModelStateError(
            f"the model went through accelerator.prepare, whose optimizer would not have the new parameters; {ORDER}"
        )


def check_not_sharded(model: nn.Module, consequence: str) -> None:
    """Raise ModelStateError when a parameter is a DTensor (FSDP2, tensor parallelism)."""
    if "torch.distributed.tensor" not in sys.modules:  # nothing is sharded: no need to look
        return
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ModelStateError(f"{name} is sharded (a DTensor of FSDP2 or tensor parallelism); {consequence}")


def _check_compiled(model: nn.Module) -> None:
    """`c = torch.compile(model)` leaves no mark on the model itself; what holds it tells.

    Also has compiled code look at hooks from now on, which it does not by default: without that, a second model of the
    same class with adapters on other layers would silently run the first one's graph.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # type: ignore[assignment]
    if getattr(sys.modules.get("torch._dynamo.convert_frame"), "FRAME_COUNTER", 1) == 0:
        return  # nothing has been compiled yet, and what will be looks at hooks; spares a search of 0.1 s
    held = any(isinstance(holder, dict) and holder.get("_orig_mod") is model for holder in gc.get_referrers(model))
    if held or hasattr(model.forward, "_torchdynamo_orig_callable"):
        raise ModelStateError(f"the model was given to torch.compile, and compiled code ignores later hooks; {ORDER}")


def variant_of(cfg: AdapterConfig) -> Variant:
    if not isinstance(cfg, AdapterConfig):
        raise ConfigError(f"attach takes a config such as LoRAConfig(r=8), not {type(cfg).__name__}")
    variant = get_variant(cfg.variant)
    if not isinstance(cfg, variant.Config):
        raise ConfigError(f"variant '{variant.name}' takes {variant.Config.__name__}, not {type(cfg).__name__}")
    if not isinstance(cfg.target_names, tuple):
        raise BrokenPlugin(f"{type(cfg).__name__}.__post_init__ must begin with super().__post_init__()")
    for field, value in cfg.to_dict().items():
        try:
            kept = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            kept = False
        if not kept:
            raise ConfigError(
                f"{type(cfg).__name__}({field}={value!r}) would not survive in an adapter file; "
                "a field holds numbers, strings, booleans, None, or a flat tuple or string-keyed dict of these"
            )
    return variant


def check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed={seed!r}: a seed is a whole number from 0")


def check_calibration(variant: Variant, data: Any) -> None:
    if data is not None and not variant.takes_calibration:
        raise CalibrationError(f"variant '{variant.name}' takes no calibration data; leave calibration_data out")


def check_behaviour(targets: Iterable[Target]) -> None:
    """Raise UnsupportedLayer for layers on which adapters would go wrong; one layer of each kind is tried."""
    layers = [target for target in targets if target.kind not in ("experts", "block")]
    layers = [t for t in layers if not is_usual(t.layer)]
    layers = [t for t in layers if not any(is_sharded(p) for p in t.layer._parameters.values())]  # looked at before
    unusual = [t for t in layers if layer_device(t.layer).type != "meta"]
    if not unusual:
        return
    from ..layers.dry_run import misbehaviour

    for target in {(type(t.layer), storage_of(t.layer)): t for t in unusual}.values():
        if why := misbehaviour(target.layer):
            raise UnsupportedLayer(
                f"{target.name}, a {type(target.layer).__name__} ({storage_of(target.layer)}), {why}; "
                f"leave it out with exclude_names=(…, '{target.name.rpartition('.')[2]}')"
            )


def warn_of_ties(model: nn.Module, targets: Iterable[Target]) -> None:
    """Warn when an embedding is adapted and a head with the same weight is not."""
    named = {target.name: target for target in targets}
    for target in [target for target in named.values() if target.kind == "embedding"]:
        weight = target.layer._parameters["weight"]
        held = (name for name, module in model.named_modules() if module._parameters.get("weight") is weight)
        if alone := [name for name in held if name not in named]:
            warnings.warn(
                f"{target.name} has the weight of {alone[0]}, too, and is adapted alone: what it adds is not in "
                f"{alone[0]}, and merge(model) will refuse",
                stacklevel=3,
            )


@torch.no_grad()
def check_lookups(targets: Iterable[Target]) -> None:
    """Raise UnsupportedLayer for a variant that cannot make anything of an embedding's token ids: one is tried."""
    target = next((target for target in targets if target.kind == "embedding"), None)
    if target is None or target.variant.forward is None:
        return
    ids = torch.arange(min(2, target.d_in), device=layer_device(target.layer))
    y = torch.zeros(len(ids), target.d_out, dtype=layer_dtype(target.layer), device=ids.device)
    given = {"x": ids, "y": y, "params": target.params, "cfg": target.cfg, "layer": target.layer, "training": False}
    try:
        target.variant.forward({**given, "context": {}})
    except KeyError:  # it asks the context for what only a call of the model has
        return
    except Exception as error:
        raise UnsupportedLayer(
            f"{target.name} is an embedding, and forward of variant '{target.variant.name}' cannot read token ids "
            f"({type(error).__name__}: {error})\n  its author makes it so with lowrank_delta(x, A, B) or "
            "project(x, A) in the place of F.linear(x, A); LAYERS says what it serves"
        ) from error


def check_has_weights(targets: Iterable[Target]) -> None:
    for target in targets:
        check_layer(target.name, target.layer)
        if layer_device(target.layer).type == "meta":
            raise ModelStateError(
                f"{target.name} is on the meta device and has no weights yet; load the base model's weights first"
            )


def check_reaction(reaction: object) -> None:
    if reaction not in ("error", "warn", "ignore"):
        raise ConfigError(f"on_base_mismatch={reaction!r}; give 'error', 'warn' or 'ignore'")
