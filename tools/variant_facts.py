"""What a variant is like, measured on one layer: the columns of docs/catalogue.md."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lora_lite as ll

D_IN, D_OUT, TOKENS = 192, 256, 512


@dataclass(frozen=True)
class Facts:
    """parameters  trained, share of the layer's own
    macs        multiply-accumulates a token, share of the layer's own
    rank        of ΔW after a step in a random direction; "full", or why it is no LoRA
    """

    name: str
    summary: str
    distribution: str
    layers: tuple[str, ...]
    parameters: float
    macs: float
    rank: str
    data: bool
    weights: bool
    peft: bool
    hooks: tuple[str, ...]


def facts(name: str) -> Facts:
    variant = ll.get_variant(name)
    first = (inspect.getdoc(variant.namespace) or "").partition("\n")[0]
    info = next(info for info in ll.list_variants(name) if info.name == name)
    model, adapter, data = _attached(variant)
    trained = sum(parameter.numel() for parameter in adapter.parameters())
    parameters = trained / (D_IN * D_OUT + D_OUT)
    x = torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(1))
    extra = _macs(model, x) - _macs(_base(), x)
    names = ("forward_input", "forward", "before_step", "penalty")
    return Facts(
        name,
        first.partition(": ")[2].rstrip(".") or first,
        info.distribution,
        tuple(variant.layers),
        parameters,
        max(extra, 0) / (TOKENS * D_IN * D_OUT),
        _rank(variant, model, adapter),
        data,
        variant.fingerprint is not None,
        variant.from_peft is not None or variant.to_peft is not None,
        tuple(hook for hook in names if getattr(variant, hook) is not None),
    )


def _base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT, bias=True))


def _config(variant: Any, **more: Any) -> ll.AdapterConfig:
    fields = variant.Config.__dataclass_fields__
    own: dict[str, Any] = {"r": 8} if "r" in fields else {}
    own |= {"rows": (1, 2), "target_names": ()} if "rows" in fields and "tied" in fields else {}
    if "linear" not in variant.layers:
        own["target_names"] = (r"^0$",)
    return variant.Config(**{**own, **more})


def _attached(variant: Any) -> tuple[nn.Module, ll.Adapter, bool]:
    """A model with the adapter, and whether that took data."""
    model = _base() if "linear" in variant.layers else nn.Sequential(nn.Sequential(nn.Linear(D_IN, D_IN)))
    try:
        return model, ll.attach(model, _config(variant)), False
    except ll.CalibrationError:
        batches = [torch.randn(512, D_IN, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
        return model, ll.attach(model, _config(variant), calibration_data=batches), True


def _macs(model: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops() / 2


def _rank(variant: Any, model: nn.Module, adapter: ll.Adapter) -> str:
    if not variant.affine:
        return "not affine"
    draws = torch.Generator().manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    layer = model[0]  # type: ignore[index]
    try:
        with ll.merged(model):
            merged = layer.weight.detach().double()
    except ll.MergeError:
        return "not merged"
    values = torch.linalg.svdvals(merged - layer.weight.detach().double())
    found = int((values > 1e-4 * values[0]).sum()) if float(values[0]) else 0
    return "full" if found > min(D_IN, D_OUT) // 2 else str(found)


SEARCH = """<input class="search-table" type="search" placeholder="search: a name, a word of the summary, a package"
 aria-label="search the table" oninput="
  const words = this.value.toLowerCase().split(/\\s+/);
  for (const row of this.closest('section').querySelectorAll('tbody tr'))
    row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));">"""


def table(names: list[str]) -> str:
    """The page's table in Markdown, under its search box."""
    lines = [
        "| variant | what it does | trained | work | rank of the change | data | one base | PEFT | lora-lite- |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        one = facts(name)
        flags = ["yes" if flag else "" for flag in (one.data, one.weights, one.peft)]
        cells = [f"[`{name}`](methods.md#{name})", one.summary, _percent(one.parameters), _percent(one.macs), one.rank]
        cells += [*flags, one.distribution.removeprefix("lora-lite-")]
        lines.append(f"| {' | '.join(cells)} |")
    return f"```{{raw}} html\n{SEARCH}\n```\n\n" + "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return "0" if share < 5e-6 else f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"
