"""Starts that PEFT takes out of the base's weight: its folders, opened here on the base as it is. The peft package opens
the same folder on the same base, or cannot, or computes something else each time; here it is equal, or refused."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lora_lite as ll

from .models import weights_hash
from .test_exchange import LINEAR, edited
from .test_export import TOKENS, gpt2, llama, logits, opened_by_peft

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's and transformers' own
STORED = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
SQUARE = {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}  # of another shape OLoRA of PEFT fails


def trained(base: Any, start: str, folder: Path, **fields: Any) -> tuple[Any, torch.Tensor]:
    """PEFT's model, its factors moved away from the start and saved, and its logits."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, **fields}
    torch.manual_seed(0)
    model, config = copy.deepcopy(base), peft.LoraConfig(init_lora_weights=start, **fields)
    if start == "corda":
        with pytest.MonkeyPatch.context() as patch:  # it takes this name of a package that PEFT does not require
            patch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
            from peft.tuners.lora.corda import preprocess_corda
        config.corda_config = peft.tuners.lora.config.CordaConfig()
        preprocess_corda(model, config, run_model=lambda: [model(row[None]) for row in TOKENS])
    if start == "lora_ga":
        config.lora_ga_config = peft.LoraGAConfig()
        run = lambda: model(TOKENS, labels=TOKENS).loss.backward()  # noqa: E731
        with pytest.warns(UserWarning, match="backward hook"):
            peft.tuners.lora.preprocess_loraga(model, config, run)
    model = peft.get_peft_model(model, config).eval()
    if start == "eva":
        peft.initialize_lora_eva_weights(model, [{"input_ids": TOKENS}] * 4, show_progress_bar=False)
    model.save_pretrained(folder.with_name("start"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model, logits(model)


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


OPENED: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "pissa": (llama, "pissa", {}),
    "olora": (llama, "olora", {}),
    "olora in other letters": (llama, "OLoRA", {}),
    "pissa, rank-stabilised": (llama, "pissa", {"use_rslora": True}),
    "olora, rank-stabilised": (llama, "olora", {"use_rslora": True}),
    "pissa, patterns": (llama, "pissa", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "olora, patterns": (llama, "olora", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "pissa, more than there are": (llama, "pissa", {"r": 100}),
    "olora, more than there are": (llama, "olora", {"r": 100}),
    "pissa, dora": (llama, "pissa", {"use_dora": True}),
    "olora, dora": (llama, "olora", {"use_dora": True, "use_rslora": True, "r": 100}),
    "pissa, dropout": (llama, "pissa", {"lora_dropout": 0.2}),
    "pissa, a head": (llama, "pissa", {"target_modules": ["lm_head", "q_proj"]}),
    "olora, a head": (llama, "olora", {"target_modules": ["lm_head", "q_proj"]}),
    "pissa, an embedding": (llama, "pissa", {"target_modules": ["embed_tokens", "q_proj"]}),
    "pissa, rows and a module": (llama, "pissa", {"trainable_token_indices": [1, 2], "modules_to_save": ["norm"]}),
    "pissa, stored transposed": (gpt2, "pissa", STORED),
    "olora, stored transposed": (gpt2, "olora", SQUARE),
    "olora, dora, stored transposed": (gpt2, "olora", {**SQUARE, "use_dora": True}),
    "pissa, biases": (gpt2, "pissa", {**STORED, "bias": "all"}),
    **{start: (llama, start, {}) for start in ("gaussian", "Gaussian", "orthogonal", "eva", "MiCA")},
}


@pytest.mark.parametrize("case", OPENED)
def test_what_peft_computes_of_the_folder(case: str, tmp_path: Path) -> None:
    make, start, fields = OPENED[case]
    base = make()
    _, expected = trained(base, start, tmp_path / "theirs", **fields)
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    near(opened_by_peft(base, tmp_path / "theirs"), expected)
    before = {name: weights_hash(base, {name}) for name in base.state_dict()}
    adapter = ll.import_peft(base, tmp_path / "theirs", trainable=start != "MiCA")
    near(logits(base.eval()), expected)
    wanted = {"pissa": "pissa", "olora": "olora", "OLoRA": "olora"}.get(start, "lora")
    embedding = "embed_tokens" in fields.get("target_modules", ())
    kinds = {one.record.variant.name for one in ll.adapters(base).values()} - {"trainable_tokens"}
    assert kinds == {"dora" if fields.get("use_dora") else wanted, *(["lora"] if embedding else [])}
    if "modules_to_save" not in fields and "bias" not in fields:
        assert all(weights_hash(base, {name}) == held for name, held in before.items()), "the base is not written"
    for name in [name for name in ll.adapters(base) if name != adapter.name]:
        ll.detach(base, name)
    ll.detach(base)
    assert {name: weights_hash(base, {name}) for name in base.state_dict()} == before


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_untrained_folder_is_the_base(start: str, tmp_path: Path) -> None:
    """The factors of the start are the frozen ones, with the signs of the file: the offsets are nothing."""
    base = llama()
    trained(base, start, tmp_path / "theirs")
    expected = logits(base)
    adapter = ll.import_peft(base, tmp_path / "start")
    near(logits(base), expected)
    for target in adapter.layers().values():
        for side in "AB":
            offset, frozen = target.params[f"lora_d{side}"], target.params[f"lora_{side}0"]
            assert float(offset.detach().abs().max()) < 1e-4 * float(frozen.detach().abs().max())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_double_and_half_precision(start: str, tmp_path: Path) -> None:
    """PEFT makes no start in float64; opened there, the folder computes what it does in float32, with less rounding."""
    _, expected = trained(llama(), start, tmp_path / "theirs")
    double = llama().double()
    ll.import_peft(double, tmp_path / "theirs")
    torch.testing.assert_close(logits(double), expected.double(), rtol=1e-5, atol=1e-5)
    half = llama().bfloat16()
    theirs = opened_by_peft(half, tmp_path / "theirs").float()
    ll.import_peft(half, tmp_path / "theirs")
    exact = logits(llama().bfloat16().double())
    assert float((logits(half).float() - theirs).abs().max()) < 0.02
    assert float((theirs - exact).abs().max()) > 0.1


BASE = r"model\.unload\(\)\.save_pretrained\(…\), write \"init_lora_weights\": true into adapter_config.json, and open the folder on that base"
REFUSED = {
    "pissa_niter_4": r"init_lora_weights='pissa_niter_4' in .*: PEFT draws this start at random, another one each time it opens the folder",
    "corda": r"init_lora_weights='corda' in .*: PEFT took factors made of data out of the base's weights, and the folder does not hold them: PEFT cannot open it either",
    "lora_ga": r"init_lora_weights='lora_ga' in .*: PEFT took factors made of gradients out of .*: PEFT opens it on a base with them, and computes something else",
}


@pytest.mark.parametrize("start", REFUSED)
def test_what_peft_does_not_compute_again(start: str, tmp_path: Path) -> None:
    """Refused with the reason; in converted form it opens, and on the base that PEFT has changed."""
    base = llama()
    theirs, expected = trained(base, start, tmp_path / "theirs")
    if start == "corda":
        with pytest.raises(ValueError, match="`eigens` attribute not found"):
            opened_by_peft(base, tmp_path / "theirs")
    else:
        assert not torch.allclose(opened_by_peft(base, tmp_path / "theirs"), expected, atol=1e-2)
    with pytest.raises(
        ll.AdapterFileError, match=f"{REFUSED[start]}.*path_initial_model_for_weight_conversion.*{BASE}"
    ):
        ll.import_peft(base, tmp_path / "theirs")
    assert not ll.adapters(base)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "plain")
    if start != "corda":  # which PEFT cannot convert
        edited(tmp_path / "start", init_lora_weights=True)
        theirs.save_pretrained(tmp_path / "conv", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        model = copy.deepcopy(base)
        assert ll.import_peft(model, tmp_path / "conv").cfg.r == 8
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    on_its_own_base(theirs, tmp_path, expected)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_changed_base_with_a_plain_folder(start: str, tmp_path: Path) -> None:
    """What PEFT's guide writes: the residual model, and the adapter with init_lora_weights=True."""
    theirs, expected = trained(llama(), start, tmp_path / "theirs")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "plain")
    on_its_own_base(theirs, tmp_path, expected)


def on_its_own_base(theirs: Any, folder: Path, expected: torch.Tensor) -> None:
    theirs.unload().save_pretrained(folder / "base")
    residual = type(llama()).from_pretrained(folder / "base").eval()
    assert not torch.allclose(
        residual.model.layers[0].self_attn.q_proj.weight, llama().model.layers[0].self_attn.q_proj.weight
    )
    near(opened_by_peft(residual, folder / "plain"), expected)
    adapter = ll.import_peft(residual, folder / "plain")
    assert adapter.record.variant.name == "lora"
    near(logits(residual), expected)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"init_lora_weights": "loftq"}, f"PEFT quantises the base's weights when it opens the folder, .*{BASE}"),
        ({"init_lora_weights": "PiSSA"}, r"no installed variant reads .*\n  with init_lora_weights='PiSSA' in adapter_config.json; save"),
        ({"lora_alpha": 0}, "q_proj: a scale of 0: the start is divided by its root"),
        ({"use_qalora": True}, f"PEFT takes the start out of the weight, and variant 'qalora' has no form for .*{BASE}"),
        ({"alora_invocation_tokens": [1]}, "and variant 'alora' has no form for that; save it where it was trained"),
    ],
)  # fmt: skip
def test_other_ways_of_pissa(fields: dict[str, Any], told: str, tmp_path: Path) -> None:
    base = llama()
    trained(base, "pissa", tmp_path / "theirs")
    with pytest.raises(ll.AdapterFileError, match=told):
        ll.import_peft(base, edited(tmp_path / "theirs", **fields))
    assert not ll.adapters(base)


def test_a_tied_head_and_a_quantised_layer(tmp_path: Path) -> None:
    tied = llama(tie_word_embeddings=True)
    trained(tied, "pissa", tmp_path / "tied", target_modules=["lm_head"])
    with pytest.raises(
        ll.AdapterFileError, match=r"lm_head: .*'pissa' .*PEFT takes the start out of model.embed_tokens, too"
    ):
        ll.import_peft(tied, tmp_path / "tied")
    base = llama()
    bnb = pytest.importorskip("bitsandbytes")
    trained(base, "olora", tmp_path / "quantised", target_modules=["q_proj"])
    layer = base.model.layers[0].self_attn
    layer.q_proj = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    with pytest.raises(
        ll.AdapterFileError, match="as it was before it was quantised, and this one is bnb-int8; give the base"
    ):
        ll.import_peft(base, tmp_path / "quantised")
