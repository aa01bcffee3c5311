"""From a LoraLiteConfig to an adapter on the model, with what is trained whole beside it: modules that the user names,
and the new heads of a task."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

import lora_lite_core as ll
from lora_lite_core import AdapterConfig, ModelStateError, TargetError
from lora_lite_core.contract.errors import did_you_mean
from lora_lite_core.contract.text import plain

from .adapter_files import saved_tensors

if TYPE_CHECKING:
    from .config import LoraLiteConfig

# As PEFT's own PeftModelFor… classes have it.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class ModulesToSave(list[str]):
    """What PEFT is shown as `modules_to_save`: PEFT puts modules of its own around those that it finds there, and ours
    are trained by the core. So it holds one name, which no module has, and what callers add goes where ours are."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(["/"])
        self.names = names

    def append(self, name: str, /) -> None:
        self.extend([name])

    def extend(self, names: Iterable[str], /) -> None:
        heads = {head for of_task in HEADS.values() for head in of_task}  # which PEFT adds by task, as with_heads does
        self.names += [name for name in names if name not in self.names and name not in heads]

    def __contains__(self, name: object) -> bool:
        return name in self.names


def with_heads(model: nn.Module, config: LoraLiteConfig) -> AdapterConfig:
    """The typed config, with these modules among its `train_modules`. Raises TargetError for a name that none has."""
    cfg, names = config.cfg, [name for name, _ in model.named_modules() if name]
    found = [
        name
        for name in names
        if name.endswith(HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ()))
    ]
    for wanted in config.trained_modules:
        here = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
        if not here:
            near = did_you_mean(wanted, [*names, *(name.rpartition(".")[2] for name in names)])
            raise TargetError(f"modules_to_save: no module is called '{wanted}'{near}")
        found += here
    taken = tuple(f"^{re.escape(name)}$" for name in dict.fromkeys(found))
    return replace(cfg, train_modules=(*cfg.train_modules, *taken)) if taken else cfg


def put_on(model: nn.Module, name: str, config: LoraLiteConfig, active: Sequence[str]) -> None:
    """Attach a new adapter, or the one of the folder that the config was read from. Raises what `attach` and `load`
    raise, and ModelStateError for a checkpoint that would be resumed under another name."""
    if config.file is not None:
        if name not in active:
            _check_resumed(model, name, Path(config.file).parent.parent, active)
        ll.load(model, config.file, name=name, on_base_mismatch=config.on_base_mismatch)
        return
    cfg = with_heads(model, config)
    ll.attach(model, cfg, name=name, calibration_data=config.calibration_data, seed=config.seed)


def _check_resumed(model: nn.Module, name: str, checkpoint: Path, active: Sequence[str]) -> None:
    """The Trainer adds what a checkpoint holds under names that the model has not, and goes on with what trains."""
    if not (checkpoint / "trainer_state.json").exists():
        return
    for one in active:
        file = checkpoint / ("" if one == "default" else one) / SAFETENSORS_WEIGHTS_NAME
        if not file.exists() and any(tensor.requires_grad for _, tensor in saved_tensors(model, one).values()):
            raise ModelStateError(
                f"{plain(checkpoint)} was trained with an adapter '{name}', and this model trains '{one}', which would "
                f"start anew; to resume, type get_peft_model(…, adapter_name='{name}'), and to have '{name}' beside "
                f"'{one}', load it after set_requires_grad('{one}', False)"
            )


def put_copy(model: nn.Module, name: str, of: str) -> None:
    """Attach a copy of another adapter under this name."""
    if ll.adapters(model)[of].record.whole:
        raise ModelStateError(
            f"TRL's reference is a copy of adapter '{of}', whose modules_to_save only one adapter can have; "
            "type model = model.merge_and_unload() and train it on with peft_config=, or give ref_model="
        )
    with tempfile.TemporaryDirectory() as folder:
        ll.save(model, Path(folder) / "copy.safetensors", name=of)
        ll.load(model, Path(folder) / "copy.safetensors", name=name)


def check_ordinary(low_cpu_mem_usage: bool, state_dict: object) -> None:
    """Raise ModelStateError for PEFT's other ways to make an adapter."""
    if low_cpu_mem_usage or nn.Linear(1, 1).weight.is_meta:
        raise ModelStateError("low_cpu_mem_usage=True: leave it out; adapters are small and are made where they belong")
    if state_dict is not None:
        raise ModelStateError("lora-lite adapters are not made of a state_dict; use PeftModel.from_pretrained")
