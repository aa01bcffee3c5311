"""PEFT's folders of convolutions, both ways: opened here, saved here, written in PEFT's layout, and opened by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lora_lite as ll

from .peft_cases import TARGETS, base_of, outputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
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
NOT_OF_ONE_DIMENSION = [("LoKr", "use_effective_conv2d")]  # in PEFT, which has an error or other outputs there


@pytest.mark.parametrize(("method", "fields"), CASES, ids=str)
def test_both_ways(method: str, fields: dict[str, Any], tmp_path: Path) -> None:
    layers = [
        name for name in TARGETS["conv"] if name != "c4" or not any((method, f) in NOT_OF_ONE_DIMENSION for f in fields)
    ]
    config = getattr(peft, f"{method}Config")(**{"target_modules": layers, **fields})
    theirs = peft.get_peft_model(base_of("conv"), config).eval()
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    expected, ours = outputs(theirs), base_of("conv")
    assert not torch.allclose(outputs(ours), expected, atol=1e-2), "it does something"
    ll.import_peft(ours, tmp_path / "theirs")
    assert far(outputs(ours), expected) < 1e-5
    ll.save(ours, tmp_path / "ours.safetensors")
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base_of("conv"), tmp_path / "ours").eval()
    assert far(outputs(back), expected) < 1e-5
    again = base_of("conv")
    ll.load(again, tmp_path / "ours.safetensors")
    assert far(outputs(again), expected) < 1e-5


def far(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of the largest output."""
    return float((got - expected).abs().max() / expected.abs().max())
