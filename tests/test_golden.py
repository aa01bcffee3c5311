"""Adapter files that earlier versions have written load for good, and compute what they did."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import lora_lite as ll

from .make_golden import GOLDEN
from .models import Net, token_ids
from .usual import SPREAD

FILES = sorted(path.name.partition(".")[0] for path in GOLDEN.glob("*.output.safetensors"))


def base() -> Net:
    model = Net()
    model.load_state_dict(load_file(GOLDEN / "base.safetensors"))
    return model


@pytest.mark.parametrize("variant", FILES)
@pytest.mark.parametrize("name", ["default", "another"])
def test_a_file_of_an_earlier_version_loads_and_computes_the_same(variant: str, name: str) -> None:
    model, expected = base(), load_file(GOLDEN / f"{variant}.output.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()), expected["base"])
        adapter = ll.load(model, GOLDEN / f"{variant}.safetensors", name=name)
        torch.testing.assert_close(model(token_ids()), expected["float32"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected["base"], expected["float32"], atol=1e-3)
    assert adapter.cfg.variant == variant


def test_every_first_party_variant_has_one() -> None:
    assert set(FILES) == {*SPREAD}
