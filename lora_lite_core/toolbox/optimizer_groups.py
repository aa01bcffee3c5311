"""Parameter groups for an optimizer: the B side with a learning rate of its own, gates without weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..attached.adapter import Adapter
from ..attached.records import names_of

B_SIDE = ("lora_B", "lora_dB")


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, b_ratio: float = 1.0, name: str | None = None
) -> list[dict[str, Any]]:
    """The trainable adapter parameters of the model (or of one adapter) as groups for a torch optimizer.

    lr            learning rate
    weight_decay  of matrices; one-dimensional tensors (gates, magnitudes, strengths, singular values) get none
    b_ratio       factor on lr for the output side of low-rank products (`lora_B`, `lora_dB`): LoRA+ with about 16

    Each group has "params", "lr", "weight_decay" and a "name"; empty groups are left out. Raises AdapterNameError.
    LoRA+: Hayou, Ghosh, Yu, 2024, arXiv:2402.12354.
    """
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "B side": {"params": [], "lr": lr * b_ratio, "weight_decay": weight_decay},
        "gates": {"params": [], "lr": lr, "weight_decay": 0.0},
    }
    for adapter_name in names_of(model, name):
        adapter = Adapter(model, adapter_name)
        params = [target.params for target in adapter.layers().values()]
        b_side = {id(tensors[bare]) for tensors in params for bare in B_SIDE if bare in tensors}
        for tensor in adapter.parameters():
            group = "gates" if tensor.dim() == 1 else "B side" if id(tensor) in b_side else "matrices"
            groups[group]["params"].append(tensor)
    return [{"name": group, **fields} for group, fields in groups.items() if fields["params"]]
