"""PEFT's tuner for lora-lite: it attaches adapters to the model, and says which of them act."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

import lora_lite_core as ll
from lora_lite_core import AdapterNameError, ModelStateError
from lora_lite_core.attached.records import all_or_nothing
from lora_lite_core.attached.switching.activity import Block, enter, leave, without
from lora_lite_core.contract.errors import listed

from .adapter_files import restore, saved_tensors, state_of_adapter
from .attaching import check_ordinary, put_copy, put_on
from .config import LoraLiteConfig
from .status import AdaptedLayer, adapted_layers

REFERENCE = "ref"  # the adapter that TRL adds to a model whose "default" is trained on


class LoraLiteModel(BaseTuner):
    """What `PeftModel.base_model` is with a LoraLiteConfig. Layers are neither replaced nor renamed: adapters are on
    them as `lora_lite.attach` puts them, and `lora_lite.adapters(peft_model.get_base_model())` shows them."""

    prefix = "/"  # PEFT looks for it in names of tensors, and finds ours by itself: in none
    tuner_layer_cls = AdaptedLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (read by PEFT, never written)
    uses_shared_state = True  # without a PeftModel nobody knows which adapter acts: PEFT refuses to make one

    _trained: dict[str, frozenset[str]]
    _merged: AbstractContextManager[None] | None = None  # the block that merge_adapter has entered
    _off: Block | None = None  # and the one of disable_adapter_layers

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Attach the adapter that `peft_config[adapter_name]` describes. It acts and trains at once if it is the first,
        else when `set_adapter` says so. Raises what `lora_lite.attach` and `load` raise."""
        check_ordinary(low_cpu_mem_usage, state_dict)
        config = cast("LoraLiteConfig", self.peft_config[adapter_name])
        twins = [other for other, one in self.peft_config.items() if one is config and other != adapter_name]
        if adapter_name == REFERENCE and twins:  # TRL copies by names of PEFT's own methods: the copy is made here
            put_copy(model, adapter_name, twins[0])
        else:
            put_on(model, adapter_name, config, self.active_adapters)
        config.file = None
        tensors = saved_tensors(model, adapter_name)
        trained = frozenset(key for key, (_, tensor) in tensors.items() if tensor.requires_grad)
        self._trained = {**vars(self).get("_trained", {}), adapter_name: trained}
        if adapter_name in self.active_adapters:
            self._train(adapter_name, not config.inference_mode)
        else:
            self._train(adapter_name, False)
            self._switch()
        self._refresh()

    # --- which adapters act --------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Have these adapters act, and train unless `inference_mode`; no others. Raises AdapterNameError."""
        names = self._known(adapter_name)
        if self._merged is not None:
            warnings.warn("an adapter is merged; it is taken out of the weights before another is set", stacklevel=2)
            self.unmerge_adapter()
        self.active_adapter = adapter_name
        self._switch()
        for name in self.peft_config:
            self._train(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turn training of these adapters on or off; what a variant keeps frozen stays so."""
        for name in self._known(adapter_names):
            self._train(name, requires_grad)

    def disable_adapter_layers(self) -> None:
        """Have no adapter act until `enable_adapter_layers`; flags of training stay as they are."""
        if self._off is None:
            self._off = Block("disabled", without(self.peft_config))
            enter(self.model, self._off)

    def enable_adapter_layers(self) -> None:
        """Have the active adapters act again."""
        if self._off is not None:
            leave(self.model, self._off)
            self._off = None

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off. If it was the active one, another takes its place, and a warning says which. With the
        last one the base's parameters get back the flags of training that they had."""
        ll.detach(self.model, adapter_name)
        self.peft_config.pop(adapter_name, None)
        self._trained.pop(adapter_name, None)
        active = [name for name in self.active_adapters if name != adapter_name]
        if not active and self.peft_config:
            active = [next(iter(self.peft_config))]
            warnings.warn(f"adapter '{adapter_name}' was active and is deleted; '{active[0]}' is now", stacklevel=3)
        self._refresh()
        self.set_adapter(active)

    def _switch(self) -> None:
        """Have the model do what `active_adapters` says. May be repeated."""
        there = ll.adapters(self.model)
        ll.activate(self.model, *(name for name in self.active_adapters if name in there))

    def _known(self, given: str | Sequence[str]) -> list[str]:
        names = [given] if isinstance(given, str) else list(given)
        if unknown := [name for name in names if name not in self.peft_config]:
            raise AdapterNameError(f"no adapter is called '{unknown[0]}'\n  there are: {listed(self.peft_config)}")
        return names

    def _train(self, name: str, flag: bool) -> None:
        for key, (_, tensor) in saved_tensors(self.model, name).items():
            if key in self._trained[name]:
                tensor.requires_grad = flag

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        to_dense: bool = False,
    ) -> nn.Module:
        """The base model with these adapters (None: the active ones) folded into its weights, and no other on it.
        `to_dense` replaces quantised layers by plain ones that hold the merged weight; what is not finite is always
        refused (`safe_merge`). Raises MergeError as `lora_lite.merge` does; then nothing has changed."""
        names = self._known(self.active_adapters if adapter_names is None else adapter_names)
        self.unmerge_adapter()
        try:
            with all_or_nothing(self.model):
                for name in [name for name in self.peft_config if name not in names]:
                    ll.detach(self.model, name)
                ll.activate(self.model, *names)
                ll.merge(self.model, to_dense=to_dense)
        except BaseException:
            self._switch()
            raise
        return self._bare()

    def unload(self) -> nn.Module:
        """The base model without any adapter, with the flags of training that it had."""
        self.unmerge_adapter()
        with all_or_nothing(self.model):
            for name in list(self.peft_config):
                ll.detach(self.model, name)
        return self._bare()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold the active adapters (or these) into the weights until `unmerge_adapter`, as `lora_lite.merged`."""
        names = self._known(self.active_adapters if adapter_names is None else adapter_names)
        if self._merged is not None:
            raise ModelStateError("an adapter is merged already; call unmerge_adapter() first")
        if len(names) > 1 and set(names) != set(self.peft_config):
            raise ModelStateError("one adapter is merged, or all of them; delete those that are not wanted")
        self._merged = ll.merged(self.model, names[0] if len(names) == 1 else None)
        try:
            self._merged.__enter__()
        except BaseException:
            self._merged = None
            raise

    def unmerge_adapter(self) -> None:
        """Take what `merge_adapter` has folded in out again: the layers get back their own weights."""
        if self._merged is not None:
            merged, self._merged = self._merged, None
            merged.__exit__(None, None, None)

    def _bare(self) -> nn.Module:
        vars(self.model).pop("peft_config", None)
        self._modules.pop("adapted", None)
        return self.model

    # --- what PEFT carries about ---------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        return state_of_adapter(_tuner_in(model).model, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Everything is done here, after everything was compared, and PEFT has nothing left to load."""
        restore(_tuner_in(model).model, adapter_name, state_dict, config.on_base_mismatch)
        return {}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing to do: the dtype of an adapter's tensors is a field of its config."""

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("lora-lite replaces no layer; see inject_adapter")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """Arguments of PEFT's that would be dropped on the way to the model, and be ignored."""
        if given := [name for name in ("adapter_names", "alora_offsets") if kwargs.get(name) is not None]:
            raise ModelStateError(f"{given[0]}= is not supported by lora-lite; use set_adapter for the whole batch")
        yield

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """A copy is outside of what the original is in."""
        super().__setstate__({**state, "_off": None})
        self._refresh()
        self._switch()

    def _refresh(self) -> None:
        """What PEFT's status shows: the layers that carry adapters now."""
        self.adapted = adapted_layers(self.model, self._trained)
        on = {path: None for name in self.peft_config for path in ll.adapters(self.model)[name].targets}
        self.targeted_module_names = list(on)


def _tuner_in(model: nn.Module) -> LoraLiteModel:
    found = next((module for module in model.modules() if isinstance(module, LoraLiteModel)), None)
    if found is None:
        raise ModelStateError(f"this {type(model).__name__} was not made by get_peft_model with a LoraLiteConfig")
    return found
