"""PEFT's folders of the methods of this package, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll
from tests.models import Net, token_ids

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


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    del model.config  # which is none of transformers'
    return model


def saved(config: Any, folder: Path) -> torch.Tensor:
    torch.manual_seed(1)
    model = peft.get_peft_model(net(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return model(token_ids()).detach()


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    expected = saved(CASES[name](), tmp_path / "theirs")
    ours = net()
    assert not torch.allclose(ours(token_ids()), expected, atol=1e-2), "it does something"
    adapter = ll.import_peft(ours, tmp_path / "theirs")
    assert adapter.cfg.variant == name.partition(" ")[0].lower()
    torch.testing.assert_close(ours(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_dropout_is_for_running_alone(kind: str, tmp_path: Path) -> None:
    config = getattr(peft, f"{kind}Config")(rank_dropout=0.5, target_modules=LAYERS)
    expected = saved(config, tmp_path / "theirs")
    with pytest.raises(ll.AdapterFileError, match=rf"rank_dropout=0.5 .*'{kind.lower()}' has no dropout"):
        ll.import_peft(net(), tmp_path / "theirs")
    ours = net()
    ll.import_peft(ours, tmp_path / "theirs", trainable=False)
    torch.testing.assert_close(ours(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_what_peft_cannot_hold(kind: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(12, 10))
    ll.attach(model, ll.LoraLiteConfig(variant=kind, r=2, target_names=("0",)))
    with pytest.raises(ll.MergeError, match=r"is read of nn\.Linear layers here, not of a Embedding"):
        ll.export_peft(model, tmp_path / "none")
