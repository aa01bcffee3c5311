"""Parameter groups: every trainable parameter once, LoRA+ on the B side, no decay on gates."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll

from .models import net


def test_groups() -> None:
    model = net()
    lora = ll.attach(model, ll.LoRAConfig(r=2), name="a")
    gates = ll.attach(model, ll.IA3Config(), name="b")
    pissa = ll.attach(model, ll.PiSSAConfig(r=2), name="c")
    groups = {group["name"]: group for group in ll.param_groups(model, lr=1e-3, weight_decay=0.1, b_ratio=16)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "matrices": (1e-3, 0.1),
        "B side": (16e-3, 0.1),
        "gates": (1e-3, 0.0),
    }
    everything = [p for adapter in (lora, gates, pissa) for p in adapter.parameters()]
    grouped = [p for group in groups.values() for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, everything))
    assert all(p.dim() == 1 for p in groups["gates"]["params"])
    assert {id(p) for p in groups["B side"]["params"]} == {
        id(t) for a in (lora, pissa) for key, t in a.named_tensors() if key.endswith(("lora_B", "lora_dB"))
    }
    torch.optim.AdamW(list(groups.values())).step()


def test_one_adapter_and_none() -> None:
    model = net()
    ll.attach(model, ll.IA3Config(), name="gates")
    assert [group["name"] for group in ll.param_groups(model, lr=1e-3, name="gates")] == ["gates"]
    with pytest.raises(ll.AdapterNameError, match="no adapter is called 'lora'"):
        ll.param_groups(model, lr=1e-3, name="lora")
