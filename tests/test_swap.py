"""Other values into an adapter that is there: for every variant, on compiled models, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite_core.files.adapter_file import CHOOSING

from .models import net, weights_hash
from .test_switching import NAMES, out, put


def saved(folder: Path, variant: str, seed: int, **given: Any) -> tuple[Path, torch.Tensor]:
    model = net()
    put(model, variant, seed=seed, **given)
    path = folder / f"{variant}{seed}.safetensors"
    ll.save(model, path)
    return path, out(model)


@pytest.mark.parametrize("variant", NAMES)
def test_every_variant_swaps_its_values(variant: str, tmp_path: Path) -> None:
    files = [saved(tmp_path, variant, seed) for seed in (3, 4)]
    model = net()
    before = weights_hash(model)
    adapter = put(model, variant, "slot", seed=5)
    tensors = {key: id(tensor) for key, tensor in adapter.named_tensors()}
    flags = [p.requires_grad for p in model.parameters()]
    for path, expected in (*files, *files):
        assert adapter.load_(path) is adapter
        assert torch.equal(out(model), expected)
    assert {key: id(tensor) for key, tensor in adapter.named_tensors()} == tensors
    assert [p.requires_grad for p in model.parameters()] == flags
    ll.detach(model)
    assert weights_hash(model) == before


@pytest.mark.parametrize("variant", ["lora", "lora_xs", "hra", "delora"])
def test_a_smaller_rank_is_padded_where_that_is_the_same(variant: str, tmp_path: Path) -> None:
    path, expected = saved(tmp_path, variant, 3, r=2)
    model = net()
    adapter = put(model, variant, "slot", seed=5, r=4)
    before = out(model)
    try:
        adapter.load_(path)
    except ll.AdapterFileError as error:
        assert variant != "lora"
        assert "has r=2 (here 4)" in str(error) or "is made" in str(error)  # noqa: PT017
        assert torch.equal(out(model), before)
    else:
        torch.testing.assert_close(out(model), expected, rtol=1e-5, atol=1e-6)


def test_another_scale_is_no_padding(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "lora", 3, r=2, alpha=8)
    model = net()
    adapter = put(model, "lora", seed=5, r=4)
    before = out(model)
    with pytest.raises(
        ll.AdapterFileError, match=r"has r=2 \(here 4\), alpha=8\S* \(here None\) on layers.0.*, and comp"
    ):
        adapter.load_(path)
    wider, _ = saved(tmp_path, "lora", 4, r=8)
    with pytest.raises(
        ll.AdapterFileError, match=r"has r=8 \(here 4\) on .*: lora_A \[8, 16\] does not go into \[4, 16\]"
    ):
        adapter.load_(wider)
    assert torch.equal(out(model), before)


def test_other_variants_layers_bases_and_states_are_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "hra", 3)
    some, _ = saved(tmp_path, "lora", 4, target_names=("q_proj",))
    fitting, _ = saved(tmp_path, "lora", 6)
    model = net()
    adapter = put(model, "lora", seed=5)
    before = out(model)
    for wrong, text in {
        path: r"holds variant 'hra', and adapter 'default' is a 'lora'",
        some: r"is on other layers",
    }.items():
        with pytest.raises(ll.AdapterFileError, match=text):
            adapter.load_(wrong)
    with pytest.raises(ll.AdapterNameError, match="no adapter is called 'x'"):
        ll.load_into(model, fitting, name="x")
    with ll.merged(model), pytest.raises(ll.ModelStateError, match=r"not inside `with merged"):
        adapter.load_(fitting)
    other: Any = net(seed=9)
    pissa, _ = saved(tmp_path, "pissa", 7)
    wrong_base = put(other, "pissa", seed=5)
    with pytest.raises(ll.BaseMismatch):
        wrong_base.load_(pissa)
    assert torch.equal(out(model), before)


def test_all_tensors_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = saved(tmp_path, "lora", 3)
    model = net()
    adapter = put(model, "lora", seed=5)
    before, real, calls = out(model), torch.Tensor.copy_, []

    def copy_(self: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copy_)
        with pytest.raises(KeyboardInterrupt):
            adapter.load_(path)
    assert torch.equal(out(model), before)


def test_heads_are_swapped_too(tmp_path: Path) -> None:
    path, expected = saved(tmp_path, "lora", 3, train_modules=("lm_head",))
    model = net()
    adapter = put(model, "lora", seed=5, train_modules=("lm_head",))
    ll.activate(model)
    adapter.load_(path)
    assert torch.equal(out(model), out(net()))
    ll.activate(model, "default")
    assert torch.equal(out(model), expected)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    files = [saved(tmp_path, "lora", seed) for seed in range(4)]
    model: nn.Module = net()
    adapter = put(model, "lora", seed=9)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    out(compiled)
    for path, expected in (*files, *files):
        adapter.load_(path)
        torch.testing.assert_close(out(compiled), expected)
    assert counter.frame_count == 1


def test_what_chooses_layers_and_ranks_is_all_that_every_config_has_but_the_dtype() -> None:
    shared = {field.name for field in fields(ll.AdapterConfig)} - {"dtype"}
    assert set(CHOOSING) == shared | {"rank_pattern", "alpha_pattern"}
