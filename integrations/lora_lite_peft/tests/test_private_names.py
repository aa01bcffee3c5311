"""What the bridge overrides and uses of PEFT's inside: each name with the arguments that PEFT has given it. When one of
these tests fails, PEFT has moved something: look at the place that is named, then widen or end the range of versions in
pyproject.toml."""

from __future__ import annotations

import inspect
from importlib.metadata import requires
from typing import Any

import peft
import pytest
from lora_lite_peft import LoraLiteConfig, LoraLiteModel
from lora_lite_peft.status import AdaptedLayer
from packaging.requirements import Requirement
from peft import PeftConfig, PeftModel, mapping
from peft.config import PeftConfigMixin
from peft.peft_model import get_layer_status
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import save_and_load
from torch import nn

# Overridden: by name the arguments that it has in PEFT, None for a plain attribute.
TUNER: dict[str, tuple[str, ...] | None] = {
    "inject_adapter": ("model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"),
    "set_adapter": ("adapter_name", "inference_mode"),
    "set_requires_grad": ("adapter_names", "requires_grad"),
    "disable_adapter_layers": (),
    "enable_adapter_layers": (),
    "delete_adapter": ("adapter_name",),
    "merge_and_unload": ("progressbar", "safe_merge", "adapter_names"),
    "unload": (),
    "merge_adapter": ("adapter_names", "safe_merge"),
    "unmerge_adapter": (),
    "_get_adapter_state_dict": ("model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"),
    "_remove_adapter_name_from_key": ("key", "adapter_name"),
    "_remap_adapter_state_dict_for_load": ("model", "config", "adapter_name", "state_dict"),
    "_cast_adapter_dtype": ("adapter_name", "autocast_adapter_dtype"),
    "_create_and_replace": ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"),
    "uses_shared_state": None,
}  # fmt: skip
LAYER: dict[str, tuple[str, ...] | None] = {
    "adapter_layer_names": None,
    "disable_adapters": None,
    "active_adapter": None,
    "merged_adapters": None,
    "quantization_backend": None,
    "_get_available_adapters": (),
    "enable_adapters": ("enabled",),
    "set_adapter": ("adapter_names", "inference_mode"),
    "set_requires_grad": ("adapter_names", "requires_grad"),
    "delete_adapter": ("adapter_name",),
    "merge": ("safe_merge", "adapter_names"),
    "unmerge": (),
}
CONFIG: dict[str, tuple[str, ...] | None] = {
    "to_dict": (),
    "save_pretrained": ("save_directory", "kwargs"),
    "from_pretrained": ("pretrained_model_name_or_path", "subfolder", "kwargs"),
}
OVERRIDDEN = [(BaseTuner, LoraLiteModel, TUNER), (BaseTunerLayer, AdaptedLayer, LAYER), (PeftConfig, LoraLiteConfig, CONFIG)]  # fmt: skip
CASES = [(theirs, ours, name, arguments) for theirs, ours, table in OVERRIDDEN for name, arguments in table.items()]
# Used, or looked for by PEFT: where it stands, and what stands there; of the last two, in this order.
USED: dict[str, tuple[Any, list[str]]] = {
    "the tables of methods": (mapping, ["PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"]),
    "what a tuner class is asked": (save_and_load, ["tuner_cls._get_adapter_state_dict(", "tuner_cls._remove_adapter_name_from_key(", "tuner_cls._remap_adapter_state_dict_for_load("]),
    "arguments that would be dropped": (PeftModel, ['"adapter_names", "alora_offsets"', "self.base_model._enable_peft_forward_hooks("]),
    "what a tuner class is": (BaseTuner, ["self.active_adapter: ", "self.peft_config", "self.prefix", "self.tuner_layer_cls", "target_module_mapping"]),
    "where the model has its config": (BaseTuner.__init__, ["self.model.peft_config = self.peft_config"]),
    "arguments for the hub": (PeftConfigMixin, ["def _split_kwargs(cls, kwargs):", "return hf_hub_download_kwargs, class_kwargs, other_kwargs"]),
    "what the status reads": (get_layer_status, [".adapter_layer_names", ".other_param_names", ".disable_adapters", ".active_adapters", ".merged_adapters", "._get_available_adapters()", '"quantization_backend"']),
    "heads by task": (peft.PeftModelForSequenceClassification, ['["classifier", "score"]', "modules_to_save.extend("]),
    "heads of questions": (peft.PeftModelForQuestionAnswering, ['["qa_outputs"]', "modules_to_save.extend("]),
    "the file comes before the config": (PeftModel.save_pretrained, ["SAFETENSORS_WEIGHTS_NAME", 'metadata={"format": "pt"}', "peft_config.save_pretrained(output_dir"]),
    "a config comes before its tensors": (PeftModel.load_adapter, [".from_pretrained(", "self.add_adapter(", "load_peft_weights(", "set_peft_model_state_dict("]),
}  # fmt: skip


def moved(what: str) -> str:
    return f"PEFT {peft.__version__} has no {what} any more; see lora_lite_peft/tuner.py, status.py, config.py"


@pytest.mark.parametrize(("theirs", "ours", "name", "arguments"), CASES, ids=[f"{c[0].__name__}.{c[2]}" for c in CASES])
def test_what_is_overridden(theirs: Any, ours: Any, name: str, arguments: tuple[str, ...] | None) -> None:
    assert hasattr(theirs, name), moved(f"{theirs.__name__}.{name}")
    assert name in vars(ours), f"{ours.__name__} does not override {name} any more; take it out of the table"
    if arguments is not None:
        has = tuple(one for one in inspect.signature(getattr(theirs, name)).parameters if one not in ("self", "cls"))
        assert has == arguments, moved(f"{theirs.__name__}.{name}({', '.join(arguments)}), it has ({', '.join(has)})")


@pytest.mark.parametrize(("theirs", "ours", "table"), OVERRIDDEN, ids=lambda one: getattr(one, "__name__", "table"))
def test_the_tables_are_complete(theirs: Any, ours: Any, table: dict[str, Any]) -> None:
    of_python = ("__init__", "__getattr__", "__annotations__", "__abstractmethods__", "_abc_impl")
    common = {*dir(nn.Module), *dir(object), *of_python}
    assert {name for name in vars(ours) if name in dir(theirs) and name not in common} == table.keys()


@pytest.mark.parametrize("what", USED)
def test_what_is_used(what: str) -> None:
    place, words = USED[what]
    source = " ".join(inspect.getsource(place).split())
    for word in words:
        assert word in source, moved(f"'{word}' in {place.__name__} ({what})")
    if "before" in what:
        places = [source.index(word) for word in words]
        assert places == sorted(places), f"PEFT {peft.__version__} has another order in {place.__name__}: {what}"


def test_this_peft_is_in_the_range() -> None:
    (asked,) = [one for text in requires("lora-lite-peft") or () if (one := Requirement(text)).name == "peft"]
    assert asked.specifier.contains(peft.__version__), asked
