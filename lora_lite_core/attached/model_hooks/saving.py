"""What `model.save_pretrained(folder)` writes of a model that carries adapters.

Left alone, it would write their tensors among the base's, where `from_pretrained` drops them with a note: the folder
would read back as the base. As long as adapters are on, the model has a `save_pretrained` of its own, an attribute of
the instance and not of its class, that calls the class's and writes each adapter's own file beside.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...layers.kinds.layer_kinds import is_sharded
from ...layers.rollback import SAVING
from ..records import Records, present_targets, records_of

FOLDER = "adapters"  # not beside model.safetensors: servers load every .safetensors file that is there


def adapter_path(folder: str | os.PathLike[str], name: str) -> Path:
    """Where the adapter of that name is in the folder of a model."""
    return Path(folder) / FOLDER / f"{name}.safetensors"


def write_adapters(model: nn.Module, folder: str | os.PathLike[str], names: Iterable[str] | None = None) -> None:
    """The file of each adapter (or of those) into the folder of a model, which is made where there is none. To be
    called on the process that writes, and on all of them where the model is sharded."""
    from ... import save  # by its public name, as a user would: adapters on a model know nothing of files

    for name in records_of(model).adapters if names is None else names:
        path = adapter_path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(model, path, name=name)


def put_savers(model: nn.Module) -> dict[str, SavePretrained]:
    """`save_pretrained` of the model's own, and `save` where the class has both (sentence-transformers), by name."""
    own = [name for name in SAVING if hasattr(type(model), name)]
    savers = {name: SavePretrained(model, name, vars(model).get(name)) for name in own}
    vars(model).update(savers)
    return savers


class SavePretrained:
    """`model.save_pretrained(folder, …)`: what the class writes, of the base alone, and adapters/<name>.safetensors.

    Called with `state_dict=` it writes that as it is given, adapters' tensors and all: that is how transformers'
    Trainer makes the checkpoints that it resumes from.
    """

    def __init__(self, model: nn.Module, name: str, before: Any) -> None:
        self.model = model
        self.name = name
        self.before = before  # an attribute of the same name that somebody else has put on the instance

    def remove(self) -> None:
        """Leave the instance as it was."""
        if vars(self.model).get(self.name) is self:
            del vars(self.model)[self.name]
            if self.before is not None:
                vars(self.model)[self.name] = self.before

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        model, pretrained = self.model, self.name == SAVING[0]
        writes = args[0] if pretrained and args else kwargs.get("is_main_process", True)
        if not os.path.isfile(save_directory) and (writes or _sharded(model)):
            write_adapters(model, save_directory)  # first: what cannot be saved is said before gigabytes are written
        save = self.before or getattr(type(model), self.name).__get__(model)
        if "state_dict" in kwargs or (pretrained and len(args) > 1):
            return save(save_directory, *args, **kwargs)
        with base_alone(model):
            return save(save_directory, *args, **kwargs)


@contextmanager
def base_alone(model: nn.Module) -> Generator[None]:
    """Inside, and in this thread only, state dicts of the model and of its parts are those of the base."""
    records, thread = records_of(model), threading.get_ident()
    ours = _tensors_by_owner(model, records)

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if threading.get_ident() == thread:
            for attribute, base in ours[module].items():
                state.pop(prefix + attribute, None)
                if base is not None:
                    state[prefix + attribute] = base

    handles: list[Any] = [module.register_state_dict_post_hook(leave_out) for module in ours]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors_by_owner(model: nn.Module, records: Records) -> dict[nn.Module, dict[str, Tensor | None]]:
    """By the modules that hold them: attributes that are an adapter's, and what the base has in their place."""
    found: dict[nn.Module, dict[str, Tensor | None]] = {}
    for name, record in records.adapters.items():
        for target in present_targets(model, name).values():
            if target is not None:
                found.setdefault(target.layer, {}).update(dict.fromkeys(target.attributes.values()))
        if record.shared:
            found.setdefault(model, {}).update(dict.fromkeys(record.shared))
        for path, whole in record.whole.items():
            owner, _, attribute = path.rpartition(".")
            found.setdefault(model.get_submodule(owner), {})[attribute] = whole.base.detach()
    return found


def _sharded(model: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in model.parameters())
