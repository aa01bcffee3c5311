"""Tiny mixtures of experts as transformers builds them, and the same with one nn.Linear for every expert."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 20,
}
IDS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(1))
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def _deepseek() -> nn.Module:
    ranks = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    groups = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL, **ranks, **groups, moe_intermediate_size=8))


MODELS: dict[str, Any] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, head_dim=8)),
    "deepseek_v3": _deepseek,
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **SMALL, num_local_experts=4, intermediate_size_mlp=8, head_dim=8, moe_layers=[0], attention_chunk_size=16
        )
    ),
}


def model(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    made = MODELS[name]().eval().to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    if name != "llama4":
        made.set_experts_implementation(implementation)
    return made


def fused_in(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module._parameters.get("down_proj"), "ndim", 0) == 3
    }


class Separate(nn.Module):
    """The experts of one fused module as two lists of nn.Linear layers."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        turned = getattr(fused, "is_transposed", True)  # Llama 4 does not say
        self.fused = [fused]
        for part in ("gate_up_proj", "down_proj"):
            stack, biases = getattr(fused, part), getattr(fused, f"{part}_bias", None)
            layers = nn.ModuleList()
            for index in range(len(stack)):
                weight = (stack[index].T if turned else stack[index]).detach().contiguous()
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=biases is not None, dtype=weight.dtype)
                layer.weight.data = weight
                if biases is not None:
                    layer.bias.data = biases[index].detach().clone()
                layers.append(layer)
            setattr(self, part, layers)

    def _gate(self, made: Tensor) -> Tensor:
        fused = self.fused[0]
        if hasattr(fused, "_apply_gate"):
            return fused._apply_gate(made)
        gate, up = made.chunk(2, dim=-1)
        return up * fused.act_fn(gate)

    def forward(self, x: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if index is None:  # Llama 4: rows are sorted already
            rows = x.view(len(self.gate_up_proj), -1, x.shape[-1])
            made = [
                down(self._gate(up(part)))
                for up, down, part in zip(self.gate_up_proj, self.down_proj, rows, strict=True)
            ]
            return torch.stack(made).view(-1, x.shape[-1])
        assert weights is not None
        out = torch.zeros_like(x)
        for number, (up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            token, place = torch.where(index == number)
            part = down(self._gate(up(x[token]))) * weights[token, place, None]
            out = out.index_add(0, token, part)
        return out


def separate(model: nn.Module) -> nn.Module:
    """A copy in which every fused module is one with separate layers."""
    model = copy.deepcopy(model)
    for path, module in fused_in(model).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Separate(module))
    return model


__all__ = ["IDS", "IMPLEMENTATIONS", "MODELS", "F", "Separate", "fused_in", "model", "separate"]
