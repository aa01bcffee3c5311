"""PEFT's folders of convolutions, both ways: opened here, saved here, written in PEFT's layout, and opened by PEFT."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lora_lite as ll

from .peft_cases import TARGETS, base_of, outputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
ELSEWHERE: list[tuple[str, str, dict[str, Any]]] = [
    ("dilated", "LoHa", {"r": 3}),
    ("dilated", "LoKr", {"r": 4}),
    ("dilated", "Hira", {"r": 4}),
    ("dilated", "IA3", {"feedforward_modules": []}),
    ("circular", "IA3", {"feedforward_modules": []}),
    ("circular", "IA3", {"feedforward_modules": ["0"]}),
    ("groups", "IA3", {"feedforward_modules": []}),
]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("LoHa", {"r": 3}),
    ("LoHa", {"r": 3, "use_effective_conv2d": True}),
    ("LoKr", {"r": 4}),
    ("LoKr", {"r": 1, "alpha": 3}),
    ("LoKr", {"r": 1, "use_effective_conv2d": True, "decompose_both": True, "decompose_factor": 4}),
    ("Hira", {"r": 4}),
    ("BOFT", {"boft_block_size": 9, "target_modules": ["c1", "c2"]}),
    ("BOFT", {"boft_block_size": 0, "boft_block_num": 3, "target_modules": ["c1", "c2"]}),
    ("OFT", {"oft_block_size": 4, "target_modules": ["c3", "fc"]}),
    ("OFT", {"oft_block_size": 2, "block_share": True, "use_cayley_neumann": False, "target_modules": ["c3", "fc"]}),
    ("IA3", {"feedforward_modules": [], "target_modules": ["c1", "c2", "c3", "fc"]}),
    ("IA3", {"feedforward_modules": ["c1", "c2", "c3"], "target_modules": ["c1", "c2", "c3"]}),
    ("HRA", {"r": 4, "target_modules": ["c1", "c2", "c3", "fc"]}),
]
ALL = [*(("conv", *case) for case in CASES), *ELSEWHERE]


@pytest.mark.parametrize(("base", "method", "fields"), ALL, ids=str)
def test_both_ways(base: str, method: str, fields: dict[str, Any], tmp_path: Path) -> None:
    layers = TARGETS[base]
    if "use_effective_conv2d" in fields and method == "LoKr":
        layers = [name for name in layers if name != "c4"]  # of nn.Conv1d PEFT has an error
    config = getattr(peft, f"{method}Config")(**{"target_modules": layers, **fields})
    theirs = peft.get_peft_model(base_of(base), config).eval()
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    expected, ours = outputs(theirs), base_of(base)
    assert not torch.allclose(outputs(ours), expected, atol=1e-2), "it does something"
    ll.import_peft(ours, tmp_path / "theirs")
    assert far(outputs(ours), expected) < 1e-5
    ll.save(ours, tmp_path / "ours.safetensors")
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base_of(base), tmp_path / "ours").eval()
    assert far(outputs(back), expected) < 1e-5
    again = base_of(base)
    ll.load(again, tmp_path / "ours.safetensors")
    assert far(outputs(again), expected) < 1e-5


def far(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of the largest output."""
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("base", "cfg", "told"),
    [
        ("circular", ll.LoHaConfig(r=2), "padding_mode='circular': PEFT's LoHa pads with zeros"),
        ("circular", ll.LoKrConfig(r=2, split="channels"), "padding_mode='circular': PEFT's LoKr pads with zeros"),
        ("circular", ll.HiRAConfig(r=2), "padding_mode='circular': PEFT's HiRA pads with zeros"),
        ("circular", ll.HRAConfig(r=2), "padding_mode='circular': PEFT's HRA pads with zeros"),
        ("dilated", ll.BOFTConfig(block_size=3, factors=1), r"PEFT's BOFT runs without dilation=\(2, 2\)"),
        ("dilated", ll.LoRAConfig(r=2), r"dilation=\(2, 2\) and padding_mode='zeros': PEFT's adapters run without"),
        ("dilated", ll.OFTConfig(block_size=3), r"PEFT's OFT takes nn\.Linear layers, not a Conv2d"),
    ],
)
def test_what_peft_computes_otherwise_is_not_written(
    base: str, cfg: ll.AdapterConfig, told: str, tmp_path: Path
) -> None:
    model = base_of(base)
    ll.attach(model, dataclasses.replace(cfg, target_names=("0",)))
    with pytest.raises(ll.MergeError, match=told):
        ll.export_peft(model, tmp_path / "none")
