"""The PeftConfig of every variant: which variant, its own config, and what PEFT and its users say beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields as fields_of
from enum import Enum
from typing import Any, cast

from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from lora_lite_core import AdapterConfig, ConfigError, get_variant, list_variants
from lora_lite_core import LoraLiteConfig as typed_config
from lora_lite_core.contract.errors import closest, listed

from .adapter_files import as_adapter_file
from .attaching import ModulesToSave


class PeftMethod(str, Enum):
    """As PEFT writes its own methods, so that its status can take the name apart; equal to the plain string."""

    LORA_LITE = "LORA_LITE"


LORA_LITE: Any = PeftMethod.LORA_LITE
OWN_FIELDS = ("variant", "modules_to_save", "seed", "calibration_data", "on_base_mismatch", "task_type", "revision")
# Fields of PEFT's other methods that callers read off a config, and what to do here instead.
ELSEWHERE = {
    "trainable_token_indices": "train embedding and head whole: modules_to_save=['embed_tokens', 'lm_head']",
}


class LoraLiteConfig(PeftConfig):
    """The config of any installed or registered variant, for `get_peft_model` and wherever else a PeftConfig goes.

    LoraLiteConfig(variant="hra", r=8, target_names=("q_proj",), task_type="CAUSAL_LM")
    LoraLiteConfig(HRAConfig(r=8), task_type="CAUSAL_LM")

    variant           its name; all fields that are not named below are those of its own config
    modules_to_save   names of modules that are trained and saved whole, as in PEFT; `train_modules` takes patterns
    seed              of the random tensors, together with the names of the layer and of the adapter
    calibration_data  batches, for variants that look at activations or gradients; not saved
    on_base_mismatch  "error", "warn" or "ignore", when a folder remembers another base model; not saved
    task_type         as in PEFT; with "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" the head is trained whole, too

    `config` is the variant's own config as plain JSON types, `cfg` the typed one. Raises UnknownVariant (MissingPlugin
    says what to install), ConfigError for a field that there is not or a value that makes no sense.
    """

    def __init__(
        self,
        cfg: AdapterConfig | None = None,
        *,
        variant: str | None = None,
        config: Mapping[str, Any] | None = None,
        modules_to_save: Sequence[str] | None = None,
        seed: int = 0,
        calibration_data: Any = None,
        on_base_mismatch: Any = "error",
        task_type: Any = None,
        inference_mode: bool = False,
        base_model_name_or_path: str | None = None,
        revision: str | None = None,
        auto_mapping: dict[str, Any] | None = None,
        peft_version: str | None = None,
        peft_type: Any = LORA_LITE,
        **fields: Any,
    ) -> None:
        super().__init__(
            task_type=task_type,
            peft_type=LORA_LITE,
            auto_mapping=auto_mapping,
            peft_version=peft_version,
            base_model_name_or_path=base_model_name_or_path,
            revision=revision,
            inference_mode=inference_mode,
        )
        if config is not None:  # of a folder: looked at when an adapter is made of it, for its plugin may be missing
            self.config = dict(config)
        else:
            self.config = _typed(cfg, variant, fields).to_dict()
        self.trained_modules = _names(modules_to_save)
        self.seed = seed
        self.calibration_data = calibration_data
        self.on_base_mismatch = on_base_mismatch
        self.file: str | None = None  # of a folder that this was read from, until its adapter is attached

    @property
    def modules_to_save(self) -> ModulesToSave:
        """For callers that look at PEFT's list of them, and add to it."""
        return ModulesToSave(self.trained_modules)

    @property
    def cfg(self) -> AdapterConfig:
        """The typed config, as HRAConfig(r=8)."""
        return typed_config(**self.config)

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes, and the arguments that make an equal config."""
        own = {"config": self.config, "modules_to_save": self.trained_modules or None, "seed": self.seed}
        return {**super().to_dict(), **own}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and make PEFT's file of tensors beside it, if it was just written there, a file
        that lora-lite opens as well. Raises AdapterFileError where PEFT was asked for a pickle."""
        if os.path.isdir(save_directory):
            as_adapter_file(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LoraLiteConfig:
        """The config of a folder or a repository of the hub, with its adapter: `get_peft_model` attaches what was
        trained. `PeftConfig.from_pretrained` gives the config alone, for a new adapter."""
        reaction = kwargs.pop("on_base_mismatch", "error")
        found: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(found, LoraLiteConfig):
            raise ConfigError(
                f"{pretrained_model_name_or_path} holds an adapter of PEFT's method {found.peft_type.value}, not of "
                "lora-lite; open it with PeftModel.from_pretrained"
            )
        found.on_base_mismatch = reaction
        found.file = cls._weights(pretrained_model_name_or_path, subfolder, kwargs)
        return found

    @classmethod
    def _weights(cls, place: str, subfolder: str | None, kwargs: dict[str, Any]) -> str | None:
        folder = os.path.join(place, subfolder or "")
        if os.path.isdir(folder):
            path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
            return path if os.path.exists(path) else None
        return hf_hub_download(place, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **cls._split_kwargs(kwargs)[0])

    def __getattr__(self, name: str) -> Any:
        hint = f"; {ELSEWHERE[name]}" if name in ELSEWHERE else ""
        if name in vars(self).get("config", ()):
            hint = f"; it is config['{name}'] here"
        raise AttributeError(f"LoraLiteConfig has no '{name}'{hint}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoraLiteConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        own = ", ".join(f"{key}={value!r}" for key, value in self.config.items())
        return f"LoraLiteConfig({own}, task_type={self.task_type!r}, modules_to_save={self.trained_modules or None})"


def _typed(cfg: AdapterConfig | None, variant: str | None, fields: Mapping[str, Any]) -> AdapterConfig:
    """The variant's config out of what LoraLiteConfig was given."""
    if isinstance(cfg, AdapterConfig) and variant is None and not fields:
        return cfg
    if cfg is not None:
        extra = listed([*(["variant"] if variant else []), *fields])
        given = f"a {type(cfg).__name__}" if not isinstance(cfg, AdapterConfig) else f"{type(cfg).__name__} and {extra}"
        raise ConfigError(
            f"LoraLiteConfig was given {given}; give a variant's config alone, as LoraLiteConfig(HRAConfig(r=8)), or "
            "names, as LoraLiteConfig(variant='hra', r=8)"
        )
    if variant is None:
        installed = listed([info.name for info in list_variants()], 40)
        raise ConfigError(f"LoraLiteConfig needs a variant, as in variant='lora'\n  installed: {installed}")
    Config = get_variant(variant).Config
    known = {one.name for one in fields_of(Config)}
    for name in fields:
        if name not in known and (near := closest(name, OWN_FIELDS)):
            raise ConfigError(
                f"LoraLiteConfig has no field '{name}'; did you mean '{near[0]}'?\n  fields of all variants: "
                f"{listed(OWN_FIELDS)}\n  fields of {variant}: {listed(sorted(known), 40)}"
            )
    return Config(**fields)


def _names(given: object) -> list[str]:
    names: Any = [] if given is None else given
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(one, str) for one in names):
        raise ConfigError(f"LoraLiteConfig(modules_to_save={given!r}): give names in a list, as in ['score']")
    return list(cast("Sequence[str]", names))
