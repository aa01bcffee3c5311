"""What is overridden and used of the inside of transformers and TRL: each name with the arguments that it has there. When
one of these tests fails, they have moved something: look at the place that is named, then widen or end the range of
versions in pyproject.toml."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from lora_lite_transformers import AdapterTrainer
from transformers import Trainer, trainer_utils
from transformers.integrations import peft as adapters_of_transformers

OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "create_optimizer": ("model",),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "save_model": ("output_dir", "_internal_call"),
    "_save": ("output_dir", "state_dict"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
    "_push_from_checkpoint": ("checkpoint_folder",),
}
USED: dict[str, tuple[str, ...]] = {
    "get_optimizer_cls_and_kwargs": ("args", "model"),
    "get_decay_parameter_names": ("model",),
}


def arguments(owner: Any, name: str) -> tuple[str, ...]:
    return tuple(one for one in inspect.signature(getattr(owner, name)).parameters if one != "self")


@pytest.mark.parametrize("name", [*OVERRIDDEN, *USED])
def test_the_trainers_methods(name: str) -> None:
    assert arguments(Trainer, name) == {**OVERRIDDEN, **USED}[name]


def test_nothing_else_is_overridden() -> None:
    ours = {name for name in vars(AdapterTrainer) if callable(getattr(AdapterTrainer, name)) and hasattr(Trainer, name)}
    assert ours - {"__init__", "__doc__", "__class__"} == OVERRIDDEN.keys()


def source(thing: Any) -> str:
    return re.sub(r"\s+", " ", inspect.getsource(thing))


def test_what_they_ask() -> None:
    assert 'if "params" in optimizer_kwargs: optimizer_grouped_parameters = optimizer_kwargs.pop("params")' in source(
        Trainer.create_optimizer
    )
    assert "self._load_from_checkpoint(resume_from_checkpoint)" in source(Trainer.train)
    assert "loss = loss / self.current_gradient_accumulation_steps" in source(Trainer.training_step)
    assert '"_hf_peft_config_loaded"' in source(trainer_utils.validate_quantization_for_training)
    assert adapters_of_transformers.PeftAdapterMixin._hf_peft_config_loaded is False


def test_what_trl_asks() -> None:
    trl = pytest.importorskip("trl", reason="TRL is in the test group")
    assert "ref_model" in inspect.signature(trl.DPOTrainer.__init__).parameters
    for kind in (trl.GRPOTrainer, trl.RLOOTrainer):
        wanted = inspect.signature(kind.__init__).parameters
        assert "reward_funcs" in wanted
        assert "ref_model" not in wanted
        assert "self.beta = args.beta" in source(kind.__init__)
        assert "if self.beta == 0.0: # If beta is 0.0, the reference model is not needed" in source(kind.__init__)
        assert "self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)" in source(kind.__init__)
    from trl.trainer.utils import add_fused_lm_head

    assert {"model", "temperature", "cast_lm_head_to_fp32"} <= inspect.signature(add_fused_lm_head).parameters.keys()
