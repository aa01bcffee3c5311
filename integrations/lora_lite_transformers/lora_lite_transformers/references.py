"""What a trainer asks of a model when it is made: that it may be trained, all of it, and one to compare it with."""

from __future__ import annotations

import inspect
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_lite_core import ModelStateError, adapters, reference_view

LOADED = "_hf_peft_config_loaded"  # how transformers knows that a quantised model carries adapters


@contextmanager
def accepted(model: Any) -> Generator[None]:
    """Inside, transformers takes a quantised model with adapters of ours for one that may be trained."""
    quantised = isinstance(model, nn.Module) and getattr(model, "is_quantized", False) and bool(adapters(model))
    if not quantised or LOADED in vars(model):
        yield
        return
    vars(model)[LOADED] = True
    try:
        yield
    finally:
        vars(model).pop(LOADED, None)


def check_head(kind: type, model: nn.Module) -> None:
    """ModelStateError for an adapter on the output embedding in one of TRL's trainers, which multiply by its weight
    themselves: the adapter would neither act nor be trained."""
    if not any(base.__module__.partition(".")[0] == "trl" for base in kind.__mro__):
        return
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    names = [name for name, module in model.named_modules() if head is not None and module is head]
    for name, adapter in adapters(model).items():
        for path in names:
            if path in adapter.targets:
                raise ModelStateError(
                    f"{kind.__name__} reads {path}.weight without calling the layer, so that adapter '{name}' on it "
                    "would neither act nor be trained; leave it out of the adapter's layers, or train it whole: "
                    f"train_modules=({path!r},)"
                )


class Reference:
    """The reference model of a trainer that would load a second one: a view of the adapters as they are now.

    DPO takes it as `ref_model`. GRPO and its like take none and load one when `beta` is not zero: they are made with
    zero, and given it afterwards.
    """

    def __init__(self, model: nn.Module, given: inspect.BoundArguments) -> None:
        self.view: Any = None
        self.beta = 0.0
        args: Any = given.arguments.get("args")
        wanted = given.signature.parameters
        takes, beta = "ref_model" in wanted, float(getattr(args, "beta", 0.0) or 0.0)
        loads = "reward_funcs" in wanted and beta != 0.0
        if not takes and not loads:
            return
        if getattr(args, "sync_ref_model", False):
            raise ModelStateError(
                "sync_ref_model=True writes the trained weights into the reference, which here is a view that shares "
                "the base with the model; leave it out, or give ref_model= a model of its own to a trainer without "
                "AdapterTrainer"
            )
        if given.arguments.get("ref_model") is not None:
            return
        if _is_sharded(args):
            raise ModelStateError(
                "the reference is a view that shares its parameters with the model, and FSDP or DeepSpeed would shard "
                "them twice; train with DDP, or give ref_model= a model of its own"
            )
        self.view = reference_view(model, adapters(model))
        if takes:
            given.arguments["ref_model"] = self.view
        else:
            self.args, self.beta = args, beta

    @contextmanager
    def making(self) -> Generator[None]:
        """While the trainer is made."""
        if not self.beta:
            yield
            return
        self.args.beta = 0.0
        try:
            yield
        finally:
            self.args.beta = self.beta

    def give_to(self, trainer: Any) -> None:
        """Where it could not be given as an argument."""
        if not self.beta:
            return
        from trl.trainer.utils import add_fused_lm_head  # pyright: ignore[reportMissingImports]

        trainer.beta = trainer.args.beta = self.beta
        cast = getattr(self.args, "cast_lm_head_to_fp32", False)
        add_fused_lm_head(self.view, temperature=trainer.temperature, cast_lm_head_to_fp32=cast)
        trainer.ref_model = trainer.accelerator.prepare_model(self.view, evaluation_mode=True)


def _is_sharded(args: Any) -> bool:
    """Whether the arguments, or accelerate's launcher, ask for it."""
    asked = [os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true") for name in ("FSDP", "DEEPSPEED")]
    return any(asked) or bool(getattr(args, "fsdp", None) or getattr(args, "deepspeed", None))
