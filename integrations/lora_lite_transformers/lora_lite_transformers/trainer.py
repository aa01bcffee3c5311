"""Any transformers Trainer for a model with adapters on it, by a mixin."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME, Trainer
from transformers.utils.logging import get_logger

from lora_lite_core import AdapterFileError, ModelStateError, adapters, follow, param_groups, penalty
from lora_lite_core.attached.model_hooks.saving import FOLDER, write_adapters
from lora_lite_core.contract.errors import listed
from lora_lite_core.contract.text import plain
from lora_lite_core.layers.kinds.layer_kinds import is_sharded

from .checkpoints import restore
from .references import Reference, accepted, check_head

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)
logger = get_logger(__name__)


class AdapterTrainer(Base):
    """A mixin: `class MyTrainer(AdapterTrainer, SFTTrainer): pass`, for a model that adapters were attached to.

    Checkpoints hold the adapters alone, `adapters/<name>.safetensors` each, beside what the Trainer keeps of its own
    state; resuming and `load_best_model_at_end` compare variant, config, names, layers and base before they change a
    value (AdapterFileError, BaseMismatch). The optimizer is of `ll.param_groups` with the arguments' learning rate and
    weight decay, `ll.follow` is called on it, and `ll.penalty` is added to the loss of every training step. Quantised
    bases are accepted. Trainers that compare with a reference model (DPO, GRPO) get a `ll.reference_view` of the
    adapters as they are when the trainer is made, instead of a second model.

    b_ratio  of `ll.param_groups`: the factor on the learning rate of the output side of low-rank products

    Raises ModelStateError for a model without adapters, and for an adapter on the head in TRL's trainers.
    """

    b_ratio: float = 1.0
    _followed: tuple[Any, tuple[str, ...]] | None = None  # the optimizer, and the adapters that it has trained

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs)
        model: Any = given.arguments.get("model", args[0] if args else None)
        if isinstance(model, nn.Module):
            check_head(type(self), model)
        reference = Reference(model, given) if isinstance(model, nn.Module) and adapters(model) else None
        with accepted(model), reference.making() if reference is not None else nullcontext():
            super().__init__(*given.args, **given.kwargs)
        self._adapted()
        if reference is not None:
            reference.give_to(self)

    def _adapted(self) -> nn.Module:
        """The model that carries the adapters, inside of what it was wrapped into."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        there = adapters(model)
        if gone := [name for name in (self._followed[1] if self._followed else ()) if name not in there]:
            raise ModelStateError(
                f"adapter {listed(gone)} was detached from the model while it was trained; what is on it now: "
                f"{listed(there)}"
            )
        if not there:
            raise ModelStateError(
                f"the {type(model).__name__} carries no adapter; type ll.attach(model, ll.LoRAConfig(r=8)) "
                "before the trainer is made"
            )
        return model

    # --- the optimizer and the loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Of the trainer's own kind, with the groups of `ll.param_groups`; followed."""
        adapted = self._adapted()
        if self.optimizer is None:
            self._create(model if model is not None else adapted)
        optimizer: Any = self.optimizer
        if self._followed is None or self._followed[0] is not optimizer:
            follow(adapted, optimizer)
            trained = (n for n, one in adapters(adapted).items() if any(True for _ in one.parameters()))
            self._followed = optimizer, tuple(trained)
        return optimizer

    def _create(self, model: nn.Module) -> None:
        chosen = self.optimizer_cls_and_kwargs
        kind, fields = chosen or self.get_optimizer_cls_and_kwargs(self.args, model)  # pyright: ignore[reportArgumentType]
        own = {"params", "model", "optimizer_dict"} & fields.keys()  # it makes groups of its own, as GaLore does
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and not own:
            self.optimizer_cls_and_kwargs = kind, {**fields, "params": list(self._groups(model))}
        try:
            super().create_optimizer(model)  # pyright: ignore[reportArgumentType]
        finally:
            self.optimizer_cls_and_kwargs = chosen
        if own:
            self._spare_vectors()

    def _spare_vectors(self) -> None:
        """In groups that another one has made (GaLore, sentence-transformers): no decay of gates and other vectors."""
        groups = param_groups(self._adapted(), lr=self.args.learning_rate, weight_decay=1.0)
        vectors = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
        optimizer: Any = self.optimizer
        for group in list(optimizer.param_groups):
            spared = [p for p in group["params"] if id(p) in vectors]
            if spared and group.get("weight_decay"):
                group["params"] = [p for p in group["params"] if id(p) not in vectors]
                optimizer.add_param_group({**group, "params": spared, "weight_decay": 0.0})

    def _groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        """Those of the adapters, and what the user has turned on beside them."""
        adapted, decay = self._adapted(), self.args.weight_decay
        groups = param_groups(adapted, lr=self.args.learning_rate, weight_decay=decay, b_ratio=self.b_ratio)
        ours = {id(parameter) for group in groups for parameter in group["params"]}
        others = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours}
        decayed = set(self.get_decay_parameter_names(model)) if others else set[str]()
        for label, amount in (("others", decay), ("others without decay", 0.0)):
            params = [p for name, p in others.items() if (name in decayed) == (label == "others")]
            if params:
                groups.append({"name": label, "params": params, "weight_decay": amount})
        return groups

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, and in training what the adapters add, once per optimizer step."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        adapted = self._adapted()
        if not model.training or not any(one.record.variant.penalty for one in adapters(adapted).values()):
            return result
        added = penalty(adapted)
        if self._is_scaled(args[1] if len(args) > 1 else kwargs.get("num_items_in_batch")):
            added = added / self.current_gradient_accumulation_steps  # or the trainer does it
        if isinstance(result, tuple):
            return result[0] + added.to(result[0].device), *result[1:]
        return result + added.to(result.device)

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the loss is of one of the batches that make a step, and not their mean: as `training_step` asks."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_items or self.compute_loss_func is not None)

    # --- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapters alone, also where the model is sharded: `adapters/<name>.safetensors` in the folder."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir if output_dir is not None else self.args.output_dir
        assert folder is not None
        adapted = self._adapted()
        if not self.args.should_save and not any(is_sharded(one) for one in adapted.parameters()):
            return
        logger.info(f"Saving adapters to {folder}")
        write_adapters(adapted, folder)
        if not self.args.should_save:
            return
        reader: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if reader is not None:
            reader.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not os.path.exists(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME)):
            raise AdapterFileError(
                f"{plain(resume_from_checkpoint)} has no {TRAINER_STATE_NAME}, which is written last: it is no "
                "checkpoint, or its writing was cut short; give resume_from_checkpoint= an earlier one"
            )
        logger.info(f"Loading adapters from {resume_from_checkpoint}")
        restore(self._adapted(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        logger.info(f"Loading the best adapters from {best} (score: {self.state.best_metric})")
        assert best is not None
        restore(self._adapted(), best)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The trainer copies the files that it knows into the folder that it uploads; here ours."""
        if self.is_world_process_zero():
            theirs = os.path.join(checkpoint_folder, FOLDER)
            assert self.args.output_dir is not None
            shutil.copytree(theirs, os.path.join(self.args.output_dir, FOLDER), dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)


def adapter_trainer(trainer: AnyTrainer) -> AnyTrainer:
    """The same trainer, with what `AdapterTrainer` does from now on; of its own class and of that one.

    What a trainer asks when it is made has been asked already: a quantised base needs the mixin, and DPO's reference is
    the one that it was given or has loaded (`ref_model=ll.reference_view(model, …)`). Call it before `train`.
    Raises ModelStateError for a model without adapters.
    """
    if not isinstance(trainer, Trainer):
        raise ModelStateError(f"adapter_trainer(trainer) takes a transformers Trainer, not {type(trainer).__name__}")
    kind = type(trainer)
    if isinstance(trainer, AdapterTrainer):
        return trainer
    trainer.__class__ = type(kind.__name__, (AdapterTrainer, kind), {"__module__": kind.__module__})
    try:
        check_head(kind, trainer._adapted())  # pyright: ignore[reportAttributeAccessIssue]
    except BaseException:
        trainer.__class__ = kind
        raise
    return trainer
