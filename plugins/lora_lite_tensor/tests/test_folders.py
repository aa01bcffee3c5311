"""PEFT's folders of the methods of this package, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll
from tests.models import token_ids
from tests.oracles import peft_net, saved_by_peft

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
LAYERS = ["q_proj", "up_proj", "down_proj"]
CASES: dict[str, Any] = {
    "LoHa": lambda: peft.LoHaConfig(target_modules=LAYERS),
    "LoHa with patterns": lambda: peft.LoHaConfig(
        r=2, alpha=3, rank_pattern={"up_proj": 3}, alpha_pattern={"q_proj": 5}, target_modules=LAYERS
    ),
    "LoKr": lambda: peft.LoKrConfig(target_modules=LAYERS),
    "LoKr with options": lambda: peft.LoKrConfig(
        r=1, alpha=3, decompose_both=True, decompose_factor=4, alpha_pattern={"q_proj": 5}, target_modules=LAYERS
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    expected = saved_by_peft(CASES[name](), tmp_path / "theirs", 0.5)
    ours = peft_net()
    assert not torch.allclose(ours(token_ids()), expected, atol=1e-2), "it does something"
    adapter = ll.import_peft(ours, tmp_path / "theirs")
    assert adapter.cfg.variant == name.partition(" ")[0].lower()
    torch.testing.assert_close(ours(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(peft_net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_dropout_is_for_running_alone(kind: str, tmp_path: Path) -> None:
    config = getattr(peft, f"{kind}Config")(rank_dropout=0.5, target_modules=LAYERS)
    expected = saved_by_peft(config, tmp_path / "theirs", 0.5)
    with pytest.raises(ll.AdapterFileError, match=rf"rank_dropout=0.5 .*'{kind.lower()}' has no dropout"):
        ll.import_peft(peft_net(), tmp_path / "theirs")
    ours = peft_net()
    ll.import_peft(ours, tmp_path / "theirs", trainable=False)
    torch.testing.assert_close(ours(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_what_peft_cannot_hold(kind: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(12, 10))
    ll.attach(model, ll.LoraLiteConfig(variant=kind, r=2, target_names=("0",)))
    with pytest.raises(
        ll.MergeError, match=r"is written of nn\.Linear, nn\.Conv1d and nn\.Conv2d here, not of a Embedding"
    ):
        ll.export_peft(model, tmp_path / "none")


@pytest.mark.parametrize(
    ("layer", "split", "wanted"),
    [
        (nn.Conv2d(4, 6, 3), "patches", "channels"),
        (nn.Conv2d(4, 6, 3), "swapped", "channels"),
        (nn.Conv1d(4, 6, 3), "channels", "swapped"),
        (nn.Conv1d(4, 6, 1), "patches", "swapped"),
        (nn.Linear(4, 6), "swapped", "channels"),
    ],
)
def test_splits_that_are_not_pefts(layer: nn.Module, split: str, wanted: str, tmp_path: Path) -> None:
    model = nn.Sequential(layer)
    ll.attach(model, ll.LoKrConfig(r=9, split=split, target_names=("0",)))
    told = (
        rf"LoKrConfig\(split='{split}'\) on a {type(layer).__name__}: PEFT computes split='{wanted}' there; merge\(mod"
    )
    with pytest.raises(ll.MergeError, match=told):
        ll.export_peft(model, tmp_path / "none")
