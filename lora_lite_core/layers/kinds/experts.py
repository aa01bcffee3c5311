"""Fused experts as linear layers: a module's parameter (E, d_out, d_in) is E of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

TRANSPOSED = ("Llama4TextExperts",)  # classes that keep (E, d_in, d_out) and do not say so
_OTHERS = ("weight",)  # of convolutions, bilinear layers


class Experts(NamedTuple):
    """One parameter of fused experts: how many, and the widths of each."""

    number: int
    d_in: int
    d_out: int


def experts_in(module: nn.Module, part: str) -> Experts | None:
    """What the parameter `part` of a module is, when it is one of fused experts: three dimensions, floating point, in a
    module that says (`is_transposed`) which of the last two is d_in."""
    weight = None if part.startswith("lora_") else module._parameters.get(part)  # that is an adapter's
    if type(weight) is not nn.Parameter or weight.dim() != 3 or not weight.is_floating_point() or part in _OTHERS:
        return None
    transposed = keeps_transposed(module)
    if transposed is None:
        return None
    number, first, second = weight.shape
    return Experts(number, first, second) if transposed else Experts(number, second, first)


def keeps_transposed(module: nn.Module) -> bool | None:
    """Whether a module's experts are (E, d_in, d_out); None where it does not say."""
    if type(module).__name__ in TRANSPOSED:
        return True
    stated = getattr(module, "is_transposed", None)
    return stated if isinstance(stated, bool) else None


def bias_name(module: nn.Module, part: str) -> str:
    """The parameter that holds the experts' biases (E, d_out), "" where there is none."""
    name = f"{part}_bias"
    return name if module._parameters.get(name) is not None else ""


class Expert(nn.Module):
    """One expert, or all of them as one layer with the outputs of all: linear, with tensors that are the module's own
    memory and no parameters."""

    def __init__(self, weight: Tensor, bias: Tensor | None, training: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias, self.training = weight, bias, training

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def expert(module: nn.Module, part: str, index: int | Tensor) -> Expert:
    """One of the experts as a linear layer."""
    held = module._parameters
    weight, bias = held[part], held.get(bias_name(module, part))
    assert weight is not None, part
    flat = weight.detach()[index]
    own = None if bias is None else bias.detach()[index]
    return Expert(flat.T if keeps_transposed(module) else flat, own, module.training)


def all_experts(module: nn.Module, part: str) -> Expert:
    """All of them as one linear layer d_in → E · d_out."""
    weight = module._parameters[part]
    assert weight is not None, part
    stack = weight.detach()
    stack = stack.transpose(1, 2) if keeps_transposed(module) else stack
    return Expert(stack.reshape(-1, stack.shape[-1]), None, module.training)
