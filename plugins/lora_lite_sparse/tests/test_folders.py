"""PEFT's folders of the methods of this package, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_lite as ll
from tests.models import token_ids
from tests.oracles import peft_net, saved_by_peft

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
LAYERS = ["q_proj", "up_proj", "down_proj"]
# Defaults, but for sizes that the small model has not.
CASES: dict[str, Any] = {
    "SHiRA": lambda: peft.ShiraConfig(r=4, target_modules=LAYERS),
    "Supertuning": lambda: peft.SupertuningConfig(sparsity=0.8, target_modules=LAYERS),
    "Supertuning of the smallest": lambda: peft.SupertuningConfig(
        sparsity=0.8, select_top=False, target_modules=LAYERS
    ),
    "Supertuning with a rank": lambda: peft.SupertuningConfig(sparsity=0.8, r=3, lora_alpha=4.5, target_modules=LAYERS),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=40, target_modules=LAYERS),
    "FourierFT with options": lambda: peft.FourierFTConfig(
        n_frequency=40, scaling=99.0, random_loc_seed=3, n_frequency_pattern={"q_proj": 40}, target_modules=LAYERS
    ),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=40, target_modules=LAYERS),
    "WaveFT with options": lambda: peft.WaveFTConfig(
        n_frequency=40, wavelet_family="db3", random_loc_seed=3, target_modules=LAYERS
    ),
    "C3A": lambda: peft.C3AConfig(block_size=8, target_modules=LAYERS),
}


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    expected = saved_by_peft(CASES[name](), tmp_path / "theirs", 0.1)
    ours = peft_net()
    assert not torch.allclose(ours(token_ids()), expected, atol=1e-2), "it does something"
    adapter = ll.import_peft(ours, tmp_path / "theirs")
    assert adapter.cfg.variant == name.partition(" ")[0].lower()
    torch.testing.assert_close(ours(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(peft_net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)


PER_LAYER: dict[str, Any] = {
    "FourierFT": lambda: peft.FourierFTConfig(
        n_frequency=40, n_frequency_pattern={"up_proj": 9}, target_modules=LAYERS
    ),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=40, proportional_parameters=True, target_modules=LAYERS),
    "C3A": lambda: peft.C3AConfig(block_size=8, block_size_pattern={"q_proj": 4}, target_modules=LAYERS),
}


@pytest.mark.parametrize("name", PER_LAYER)
def test_sizes_that_differ_are_read_and_not_written(name: str, tmp_path: Path) -> None:
    expected = saved_by_peft(PER_LAYER[name](), tmp_path / "theirs", 0.1)
    ours = peft_net()
    ll.import_peft(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ll.MergeError, match=r"has (n_frequency|block_size)=\d+, and PEFT has one for all modules"):
        ll.export_peft(ours, tmp_path / "ours")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            lambda: peft.SupertuningConfig(sparsity=0.8, save_precomputed_indices=False, target_modules=LAYERS),
            "save_precomputed_indices=False leaves out which entries they are",
        ),
        (
            lambda: peft.WaveFTConfig(n_frequency=9, wavelet_family="sym4", target_modules=LAYERS),
            "the wavelets here are db1",
        ),
    ],
)
def test_what_is_refused(config: Any, told: str, tmp_path: Path) -> None:
    saved_by_peft(config(), tmp_path / "theirs", 0.1)
    with pytest.raises(ll.AdapterFileError, match=told):
        ll.import_peft(peft_net(), tmp_path / "theirs")


@pytest.mark.parametrize("name", ["SHiRA", "Supertuning"])
def test_places_of_a_stranger(name: str, tmp_path: Path) -> None:
    saved_by_peft(CASES[name](), tmp_path, 0.1)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("indices"))
    for wrong in (-1, 10_000):
        changed = tensors[key].clone()
        changed.view(-1)[-1] = wrong
        save_file({**tensors, key: changed}, path)
        with pytest.raises(ll.AdapterFileError, match=r"holds columns that are none of|indices are not \d+ places in"):
            ll.import_peft(peft_net(), tmp_path)
    save_file({**tensors, key: tensors[key].float()}, path)  # as Windows has it
    ll.import_peft(peft_net(), tmp_path)
