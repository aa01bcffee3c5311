"""The whole state of a model, of the process and of files, to be compared before and after an operation."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import lora_lite as ll

from .small import X

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
KEPT = (bool, int, float, str, torch.dtype, type(None))  # attributes of a module that are compared by value
State = dict[str, Any]


class Known:
    """The objects of a model by identity, as names that can be compared between copies of it."""

    def __init__(self, model: nn.Module) -> None:
        self.objects: list[Any] = []  # alive, so that no id is used again
        self.names: dict[int, str] = {}
        for path, module in model.named_modules():
            self._add(path or "the model", module)
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                self._add(f"{path}.{name}", tensor)
                if tensor is not None and tensor.grad is not None:
                    self._add(f"{path}.{name}.grad", tensor.grad)

    def _add(self, name: str, found: Any) -> None:
        self.objects.append(found)
        self.names.setdefault(id(found), name)

    def __call__(self, found: Any) -> str:
        return self.names.get(id(found), f"new {type(found).__name__}")


def content(tensor: Tensor | None) -> Any:
    if tensor is None or tensor.device.type == "meta":
        return tensor if tensor is None else ("meta", tensor.dtype, tuple(tensor.shape))
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.device.type, tensor.dtype, tuple(tensor.shape), data.numpy().tobytes()


def attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@torch.no_grad()
def output(model: nn.Module) -> Any:
    """Of a copy where layers are quantised: those note things down in a forward pass, or rearrange their weights."""
    if any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        model = copy.deepcopy(model).train()
    return attempt(lambda: content(model(X)))


@torch.no_grad()
def output_when_trained(model: nn.Module) -> Any:
    """With other values in all adapters, for those that compute what the base does."""
    ours = [p for name, p in model.named_parameters() if "lora_" in name and p.device.type != "meta"]
    values = [p.clone() for p in ours]
    for p in ours:
        p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape).sin())
    found = output(model)
    for p, value in zip(ours, values, strict=True):
        p.copy_(value)
    return found


def nesting() -> int:
    """How many autocast blocks we are in; it can only be read by changing it."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def process() -> State:
    umask = os.umask(0)
    os.umask(umask)
    return {
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), nesting()),
        "default dtype": torch.get_default_dtype(),
        "random numbers": torch.get_rng_state().numpy().tobytes(),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "warning filters": len(warnings.filters),
        "umask": umask,
    }


def state(model: nn.Module, known: Known, folder: Path) -> State:
    """Everything that must be as before, or as after, under names that say what is not."""
    found: State = dict(process())
    for path, module in model.named_modules():
        held = (*module._parameters.items(), *module._buffers.items())
        found[f"tensors of '{path}'"] = [
            (name, known(t), content(t), t is not None and (t.requires_grad, t.grad is not None and known(t.grad)))
            for name, t in held
        ]
        plain = {key: value if isinstance(value, KEPT) else "" for key, value in vars(module).items()}
        found[f"attributes of '{path}'"] = (known(module), type(module), plain)
        for kind in HOOKS:
            hooks, given = getattr(module, kind), getattr(module, f"{kind}_with_kwargs")
            listed = [(f"{hook.__module__}.{hook.__qualname__}", key in given) for key, hook in hooks.items()]
            found[f"{kind} of '{path}'"] = (listed, len(given))
    found["parameters"] = [name for name, _ in model.named_parameters()]
    found["adapters"] = [(name, attempt(lambda a=a: repr(a))) for name, a in ll.adapters(model).items()]
    found["state dict"] = [(name, content(tensor)) for name, tensor in model.state_dict().items()]
    found["output"] = output(model)
    found["files"] = {str(path): file_content(path) for path in files_in(folder)}
    return found


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def file_content(path: Path) -> Any:
    """A .safetensors file's tensors and header, in whatever order they were written."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {key: content(file.get_tensor(key)) for key in file.keys()}, file.metadata()  # noqa: SIM118


def differences(found: State, expected: State) -> str:
    return ", ".join(key for key in {**expected, **found} if found.get(key) != expected.get(key))


def restore(before: State) -> None:
    """What an interruption has left in the process must not spoil the next run."""
    while len(modes := _get_current_dispatch_mode_stack()) > before["dispatch modes"]:
        modes[-1].__exit__(None, None, None)
    while nesting() > before["autocast"][2]:
        torch.autocast_decrement_nesting()
    torch.set_autocast_enabled("cpu", before["autocast"][0])
    torch.set_grad_enabled(before["grad mode"][0])
    torch.set_rng_state(torch.frombuffer(bytearray(before["random numbers"]), dtype=torch.uint8))
    os.umask(before["umask"])
