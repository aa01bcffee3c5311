"""Folders of PEFT: what it has saved is opened here, what is written here is opened there, with the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from tests.models import net, token_ids

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
NAMES = ["q_proj", "v_proj", "up_proj", "down_proj"]


def base() -> Any:
    model = net()
    del model.config  # which is none of transformers'
    return model


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model.eval()(token_ids())


THEIRS: dict[str, Any] = {"bitfit": lambda: peft.BeftConfig(target_modules=NAMES)}
OURS: dict[str, ll.AdapterConfig] = {"bitfit": ll.BitFitConfig(target_names=NAMES)}


@pytest.mark.parametrize("case", THEIRS)
def test_theirs_are_opened_here_and_go_back(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base(), THEIRS[case]())
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = output(theirs)
    assert not torch.allclose(output(base()), expected, atol=1e-2)
    ours = base()
    assert ll.import_peft(ours, tmp_path / "theirs").record.variant.name == case.split(":")[0]
    torch.testing.assert_close(output(ours), expected, rtol=1e-5, atol=1e-5)
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    torch.testing.assert_close(output(back), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", OURS)
def test_ours_are_opened_there_and_come_back(case: str, tmp_path: Path) -> None:
    model = base()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in ll.attach(model, OURS[case]).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = output(model)
    assert not torch.allclose(output(base()), expected, atol=1e-2)
    ll.export_peft(model, tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    torch.testing.assert_close(output(there), expected, rtol=1e-5, atol=1e-5)
    again = base()
    assert ll.import_peft(again, tmp_path / "ours").cfg.to_dict().keys() == OURS[case].to_dict().keys()
    torch.testing.assert_close(output(again), expected, rtol=1e-5, atol=1e-5)
