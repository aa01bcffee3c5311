"""Which whole modules an adapter file trains: by names, never by running a pattern of the file."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from ..attached.targets.train_modules import check_trainable, outermost, tensors_in
from ..contract.config import AdapterConfig
from ..contract.errors import AdapterFileError, did_you_mean, listed
from .adapter_file import AdapterFile


def exact_patterns(model: nn.Module, tensor_names: Iterable[str]) -> list[str]:
    """Patterns that match the modules of these tensors and nothing else, or the single parameters."""
    modules, parameters = whole_and_single(model, tensor_names)
    return [f"^{re.escape(path)}$" for path in (*modules, *parameters)]


def whole_and_single(model: nn.Module, tensor_names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The modules of which all is among these tensors, and the parameters of others."""
    names = set(tensor_names)
    owners = dict.fromkeys(name.rpartition(".")[0] for name in tensor_names)
    modules = [path for path in owners if path and set(_base_tensors(model, path)) <= names]
    outer = outermost(modules)
    single = [name for name in names if not any(name.startswith(f"{path}.") for path in outer)]
    return outer, sorted(single)


def _base_tensors(model: nn.Module, path: str) -> Iterable[str]:
    held = model.get_submodule(path).state_dict(keep_vars=True)
    return (f"{path}.{name}" for name in held if not name.rpartition(".")[2].startswith("lora_"))


def trained_whole(file: AdapterFile, model: nn.Module, cfg: AdapterConfig) -> dict[str, Tensor]:
    """The base's tensors that the file trains whole. Which ones is said by exact patterns, as `save` writes them; for
    those of earlier files by the names of the file's tensors."""
    layers = {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}
    paths = [name for pattern in cfg.train_modules if (name := exact_name(pattern))]
    if len(paths) < len(cfg.train_modules):
        owners = (key.rpartition(".") for key in file.tensors)
        paths = list(dict.fromkeys(path for path, _, name in owners if not name.startswith("lora_")))
    if missing := [path for path in paths if path not in layers]:
        raise AdapterFileError(
            f"{file.path} trains {listed(missing, 3)} whole, which this {type(model).__name__} does not have"
            f"{did_you_mean(missing[0], layers)}"
        )
    found = tensors_in(model, paths) if cfg.train_modules else {}
    check_trainable(model, found)
    return found


def exact_name(pattern: str) -> str | None:
    """The one name that a pattern of the form ^…$ without any operator matches."""
    name = re.sub(r"\\(.)", r"\1", pattern[1:-1])
    return name if pattern == f"^{re.escape(name)}$" else None
