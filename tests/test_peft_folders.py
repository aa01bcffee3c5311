"""Every weight method of PEFT and every option that changes numbers: the folder that the peft package writes opens here
with the same outputs, or is refused with what, why and what to type."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_lite as ll
from lora_lite_core.files.peft.config_json.fields import TRAINED

peft = pytest.importorskip("peft")
from .peft_cases import METHODS, Case, base_of, everywhere, options, outputs  # noqa: E402

# peft's and transformers' own; the last tells of patterns that match nothing
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning")
OPTIONS, EVERYWHERE = options(), everywhere()
PROMPTS = {
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "CARTRIDGE",
    "ADAPTION_PROMPT",
}
NETWORKS = {"XLORA", "SHADOW"}  # several adapters, another network


def saved(case: Case, folder: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """The base, and what PEFT's model computes with values that were moved from the start."""
    base = base_of(case.base)
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(base), case.config()).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(case.size * torch.randn(parameter.shape).to(parameter))
    model.save_pretrained(folder)
    return base, outputs(model)


def trains_otherwise(case: Case) -> bool:
    own = case.method == "Lora" and case.fields.keys() & {*TRAINED}
    return bool(own) or any(f.endswith("dropout") and (case.method, f) != ("Lora", "lora_dropout") for f in case.fields)


def check(case: Case, folder: Path) -> None:
    base, expected = saved(case, folder)
    if case.refused:
        with pytest.raises(ll.AdapterFileError, match=case.refused):
            ll.import_peft(base, folder)
        assert not ll.adapters(base)
        return
    before = outputs(base)
    ll.import_peft(base, folder, trainable=not trains_otherwise(case))
    got, tolerance = outputs(base.eval()), {"atol": 2e-5, "rtol": 1e-4}
    if case.base == "float64":  # what PEFT opens: it writes some tensors in float32
        expected, tolerance = (
            outputs(peft.PeftModel.from_pretrained(base_of(case.base), folder).eval()),
            {"atol": 1e-6, "rtol": 0},
        )
    if case.base == "bfloat16":
        tolerance = {"atol": 0.08 * float(expected.abs().max()), "rtol": 0}
    torch.testing.assert_close(got, expected, **tolerance)
    if "alora_invocation_tokens" not in case.fields:
        assert float((expected - before).abs().max()) > 1e-4, "it does something"


def test_no_weight_method_is_left_out() -> None:
    types = {getattr(peft, f"{name}Config")().peft_type for name in METHODS if name not in ("AdaLora",)} | {"ADALORA"}
    assert {str(one.value) for one in peft.PeftType} - PROMPTS - NETWORKS == {
        str(getattr(one, "value", one)) for one in types
    }


CONVOLUTIONS = ("conv", "groups", "pixels", "dilated", "circular", "uneven")
FIRST = {case.method: name for name, case in reversed(OPTIONS.items())}  # the others take minutes in all
QUICK = {
    *FIRST.values(),
    *(name for name, case in OPTIONS.items() if case.method == "Lora" or case.base in CONVOLUTIONS),
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
def test_options(name: str, tmp_path: Path) -> None:
    check(OPTIONS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYWHERE)
def test_what_methods_have_in_common(name: str, tmp_path: Path) -> None:
    check(EVERYWHERE[name], tmp_path)


def test_a_tied_module_after_untying(tmp_path: Path) -> None:
    """What the refusal says to type."""
    base, expected = saved(Case("tied", "Lora", {"r": 4, "modules_to_save": ["embed_tokens"]}), tmp_path)
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    ll.import_peft(base, tmp_path)
    torch.testing.assert_close(outputs(base), expected, rtol=1e-4, atol=2e-5)


def test_a_pickle_and_shards(tmp_path: Path) -> None:
    case = Case("llama", "Lora", {"r": 4, "init_lora_weights": False})
    base, expected = saved(case, tmp_path / "theirs")
    model = peft.PeftModel.from_pretrained(base_of("llama"), tmp_path / "theirs")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled/adapter_model.bin").exists()
    with pytest.raises(
        ll.AdapterFileError, match=r"a .bin is a pickle, which is not read, .* type model.save_pretrained"
    ):
        ll.import_peft(base, tmp_path / "pickled")
    opened = peft.PeftModel.from_pretrained(base_of("llama"), tmp_path / "pickled")
    opened.save_pretrained(tmp_path / "pickled")
    ll.import_peft(base, tmp_path / "pickled")
    torch.testing.assert_close(outputs(base), expected, rtol=1e-4, atol=2e-5)
    ll.detach(base)
    held = tmp_path / "theirs/adapter_model.safetensors"
    held.rename(held.with_name("adapter_model-00001-of-00002.safetensors"))
    with pytest.raises(ll.AdapterFileError, match=r"holds no adapter_model.safetensors \(there: .*00001-of-00002"):
        ll.import_peft(base, tmp_path / "theirs")


def test_embeddings_that_peft_saves_beside(tmp_path: Path) -> None:
    """Of a base with new tokens it writes both tables; they must be those of the model here."""
    base = base_of("llama")
    model = peft.get_peft_model(
        copy.deepcopy(base), Case("llama", "Lora", {"r": 4, "init_lora_weights": False}).config()
    ).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} <= set(
        load_file(tmp_path / "adapter_model.safetensors")
    )
    ll.import_peft(base, tmp_path)
    torch.testing.assert_close(outputs(base), outputs(model), rtol=1e-4, atol=2e-5)
    ll.detach(base)
    base.lm_head.weight.data[0, 0] += 1
    with pytest.raises(
        ll.AdapterFileError, match=r"lm_head.weight \(64, 64\) is not this model's .*give the base those weights first"
    ):
        ll.import_peft(base, tmp_path)


def changed(folder: Path, **fields: object) -> Path:
    """The same folder with other fields in its config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("field", TRAINED)
def test_what_peft_trains_otherwise_is_run_and_then_trained_as_a_lora(field: str, tmp_path: Path) -> None:
    name = next(name for name, case in OPTIONS.items() if field in case.fields)
    base, expected = saved(OPTIONS[name], tmp_path / "theirs")
    with pytest.raises(ll.AdapterFileError, match=rf"{field}=.* {TRAINED[field]}; .*trainable=False\).*'lora'$"):
        ll.import_peft(base, tmp_path / "theirs")
    ll.save(ll.import_peft(base, tmp_path / "theirs", trainable=False).model, tmp_path / "ours.safetensors")
    ll.detach(base)
    adapter = ll.load(base, tmp_path / "ours.safetensors")
    torch.testing.assert_close(outputs(base), expected, rtol=1e-4, atol=2e-5)
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    if field != "use_bdlora":  # without the field nobody knows what its tensors are
        ll.detach(base)
        with pytest.raises(
            ll.AdapterFileError, match=r"lora_(velora|monteclora)_.* is nothing that variant 'lora' reads"
        ):
            ll.import_peft(base, changed(tmp_path / "theirs", **{field: None}), trainable=False)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (3, r"q_proj: use_bdlora={.*}: nblocks is a whole number that divides 4 and 64"),
        (None, r"q_proj: use_bdlora={.*}: nblocks is a whole number that divides 4 and 64"),
        (4, r"q_proj: lora_A is \(4, 32\); with nblocks=4 it is \(4, 64\) or \(4, 16\)"),
    ],
)
def test_blocks_of_another_number(given: object, told: str, tmp_path: Path) -> None:
    name = next(name for name, case in OPTIONS.items() if "use_bdlora" in case.fields)
    base, _ = saved(OPTIONS[name], tmp_path)
    with pytest.raises(ll.AdapterFileError, match=told):
        ll.import_peft(base, changed(tmp_path, use_bdlora={"nblocks": given}), trainable=False)
    assert not ll.adapters(base)
