"""Folders of PEFT: what it has saved is opened here, what is written here is opened there, with the same outputs."""

from __future__ import annotations

import json
import warnings
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


def boft(**fields: Any) -> Any:
    with warnings.catch_warnings():  # of an extension that cannot be built here
        warnings.simplefilter("ignore")
        return peft.BOFTConfig(target_modules=NAMES, **fields)


THEIRS: dict[str, Any] = {
    "bitfit": lambda: peft.BeftConfig(target_modules=NAMES),
    "boft: default": boft,
    "boft: blocks": lambda: boft(boft_block_size=0, boft_block_num=2),
    "oft: default": lambda: peft.OFTConfig(target_modules=NAMES, oft_block_size=8),
    "oft: series": lambda: peft.OFTConfig(target_modules=NAMES, oft_block_size=4, num_cayley_neumann_terms=3),
    "oft: exact": lambda: peft.OFTConfig(target_modules=NAMES, oft_block_size=8, use_cayley_neumann=False),
    "oft: constrained": lambda: peft.OFTConfig(target_modules=NAMES, oft_block_size=8, coft=True, eps=0.5),
    "oft: shared": lambda: peft.OFTConfig(target_modules=NAMES, oft_block_size=8, block_share=True),
    "oft: shared blocks": lambda: peft.OFTConfig(
        target_modules=["q_proj", "v_proj"], r=2, oft_block_size=0, block_share=True
    ),
    "psoft: default": lambda: peft.PsoftConfig(target_modules=NAMES, r=4),
    "psoft: pissa": lambda: peft.PsoftConfig(target_modules=NAMES, r=4, psoft_alpha=9, ab_svd_init="pissa_init"),
    "psoft: free": lambda: peft.PsoftConfig(target_modules=NAMES, r=4, psoft_orth=False, psoft_mag_b=False),
    "psoft: free, of one number": lambda: peft.PsoftConfig(target_modules=NAMES, r=1, psoft_orth=False),
    "psoft: series": lambda: peft.PsoftConfig(
        target_modules=NAMES, r=4, use_cayley_neumann=True, cayley_neumann_eps=0.2, psoft_dropout=0.1
    ),
}
OURS: dict[str, ll.AdapterConfig] = {
    "bitfit": ll.BitFitConfig(target_names=NAMES),
    "boft": ll.BOFTConfig(block_size=4, factors=1, target_names=NAMES),
    "oft: constrained": ll.OFTConfig(block_size=8, coft=True, eps=0.4, target_names=NAMES),
    "oft: shared series": ll.OFTConfig(block_size=8, terms=6, block_share=True, target_names=NAMES),
    "psoft": ll.PSOFTConfig(r=4, dropout=0.1, target_names=NAMES),
    "psoft: pissa": ll.PSOFTConfig(r=4, start="pissa", mag_in=False, target_names=NAMES),
    "psoft: free": ll.PSOFTConfig(r=4, orthogonal=False, target_names=NAMES),
    "psoft: series": ll.PSOFTConfig(r=4, terms=6, bound=0.5, target_names=NAMES),
}


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


def edited(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("oft", {"peft_version": "0.17.1"}, r"peft_version='0.17.1': PEFT's series was another one before 0.18.0"),
        ("oft", {"peft_version": None}, r"use_cayley_neumann=True with peft_version=None: PEFT's series was another"),
        ("oft", {"num_cayley_neumann_terms": 1}, r"OFTConfig\(terms=1\): a series that turns has at least 2 terms"),
        ("oft", {"coft": True, "eps": None}, r"OFTConfig\(eps=None\): eps is a finite number"),
        ("oft", {"block_share": True}, r"lora_q"),
        ("boft", {"boft_block_size": 8}, r"boft_R holds 4 blocks of 4, but boft_block_size=8 and boft_block_num=0"),
        (
            "boft",
            {"bias": "boft_only"},
            r"bias='boft_only' in adapter_config.json: adapter_model.safetensors lacks layers.0.self_attn.q_proj.bias",
        ),
        ("psoft", {"ab_svd_init": "olora_init"}, r"PSOFTConfig\(start='olora'\): give 'psoft' or 'pissa'"),
        ("psoft", {"psoft_svd": "half"}, r"psoft_svd='half': PEFT has 'full' and 'lowrank'"),
        ("boft", {"boft_dropout": 0.1}, r"boft_dropout=0.1 in adapter_config.json: variant 'boft' has no dropout"),
    ],
)
def test_what_cannot_be_read(method: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    peft.get_peft_model(base(), THEIRS[f"{method}: default"]()).save_pretrained(tmp_path / "theirs")
    model = base()
    with pytest.raises(ll.AdapterFileError, match=message):
        ll.import_peft(model, edited(tmp_path / "theirs", **fields))
    assert not ll.adapters(model)


def test_factors_that_peft_has_not_made(tmp_path: Path) -> None:
    """Without its extension PEFT makes one factor, whatever its config says: the tensors count."""
    theirs = peft.get_peft_model(base(), boft(boft_n_butterfly_factor=2))
    theirs.save_pretrained(tmp_path / "theirs")
    model = base()
    adapter = ll.import_peft(model, tmp_path / "theirs")
    assert adapter.cfg.to_dict()["factors"] == theirs.base_model.model.layers[0].up_proj.boft_R["default"].shape[0]


def test_psoft_of_an_approximate_decomposition(tmp_path: Path) -> None:
    """Its factors are made again with PEFT's seed; they go back to no folder, because PEFT's other mode is exact."""
    theirs = peft.get_peft_model(
        base(), peft.PsoftConfig(target_modules=NAMES, r=4, psoft_svd="lowrank", psoft_svd_lowrank_niter=1)
    )
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = base()
    before = torch.get_rng_state()
    ll.import_peft(ours, tmp_path / "theirs")
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ll.MergeError, match="PEFT makes the frozen factors of PSOFT anew from the weight, and its singu"
    ):
        ll.export_peft(ours, tmp_path / "ours")
