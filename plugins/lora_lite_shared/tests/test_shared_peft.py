"""The peft package computes the same from the same tensors, gradients and all, and reads and writes the same folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from tests.models import Net, token_ids
from tests.peft_cases import base_of, outputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
TARGETS = ["q_proj", "up_proj", "down_proj"]  # 16 → 16, 16 → 24, 24 → 16
Pairs = Callable[[Any, dict[str, Tensor]], list[tuple[Tensor, Tensor]]]  # of a layer: PEFT's tensor, and ours


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    del model.config  # which is none of transformers'
    return model.eval()


def vera(layer: Any, p: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(layer.vera_lambda_d["default"], p["lora_d"]), (layer.vera_lambda_b["default"], p["lora_b"])]


def pvera(layer: Any, p: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(layer.pvera_lambda_d["default"], p["lora_d"]), (layer.pvera_lambda_b["default"], p["lora_b"])]


def vb_lora(layer: Any, p: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    logits = [(getattr(layer, f"vblora_logits_{side}")["default"], p[f"lora_logits_{side}"]) for side in "AB"]
    return [*logits, (layer.vblora_vector_bank["default"], p["lora_bank"])]


def randlora(layer: Any, p: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(layer.randlora_lambda["default"], p["lora_l"]), (layer.randlora_gamma["default"], p["lora_g"])]


def uni_lora(layer: Any, p: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(layer.unilora_theta_d["default"], p["lora_theta"])]


def tinylora(layer: Any, p: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(layer.tinylora_v["default"][layer._tinylora_v_key["default"]], p["lora_v"])]


def lily(layer: Any, p: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    names = (("lily_A", "lora_A"), ("lily_B", "lora_B"), ("lily_router", "lora_R"))
    return [(getattr(layer, theirs)["default"].weight, p[ours]) for theirs, ours in names]


def frod(layer: Any, p: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(layer.frod_lambda_l["default"], p["lora_l"]), (layer.frod_lambda_s_values["default"], p["lora_s"])]


vb = {"r": 4, "num_vectors": 10, "vector_length": 8, "topk": 3}
CASES: dict[str, tuple[Pairs, Any, dict[str, Any]]] = {
    "vera": (vera, peft.VeraConfig, {"r": 4}),
    "vera, projections not saved": (
        vera,
        peft.VeraConfig,
        {"r": 4, "save_projection": False, "projection_prng_key": 3, "d_initial": 0.3},
    ),
    "pvera": (pvera, peft.PveraConfig, {"r": 4}),
    "pvera, projections not saved": (pvera, peft.PveraConfig, {"r": 4, "save_projection": False}),
    "vb_lora": (vb_lora, peft.VBLoRAConfig, vb),
    "vb_lora, K alone": (vb_lora, peft.VBLoRAConfig, {**vb, "save_only_topk_weights": True}),
    "randlora": (randlora, peft.RandLoraConfig, {"r": 4, "randlora_alpha": 8}),
    "randlora, sparse": (randlora, peft.RandLoraConfig, {"r": 5, "sparse": True, "randlora_alpha": 8}),
    "uni_lora": (uni_lora, peft.UniLoraConfig, {"theta_d_length": 100, "proj_seed": 3}),
    "uni_lora, places saved": (uni_lora, peft.UniLoraConfig, {"theta_d_length": 100, "save_indices": True}),
    "tinylora": (tinylora, peft.TinyLoraConfig, {"u": 6}),
    "tinylora, tied": (tinylora, peft.TinyLoraConfig, {"u": 6, "weight_tying": 1.0}),
    "tinylora, projections not saved": (tinylora, peft.TinyLoraConfig, {"u": 6, "save_projection": False}),
    "lily": (lily, peft.LilyConfig, {"r": 4}),
    "lily, two blocks share": (lily, peft.LilyConfig, {"r": 4, "stride_A": 2, "num_B": 3, "scaling": 0.5}),
    "frod": (frod, peft.FrodConfig, {"progressbar": False, "sparse_rate": 0.1}),
}


def theirs(config: Any, fields: dict[str, Any]) -> Any:
    """PEFT's model, its trained tensors moved."""
    torch.manual_seed(1)
    model = peft.get_peft_model(net(), config(target_modules=TARGETS, **fields))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_folders_both_ways(case: str, tmp_path: Path) -> None:
    _, config, fields = CASES[case]
    model = theirs(config, fields)
    model.save_pretrained(tmp_path / "theirs")
    expected, base = model(token_ids()).detach(), net()(token_ids()).detach()
    assert float((expected - base).abs().max()) > 5e-3, "it does something"
    ours = net()
    ll.import_peft(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(token_ids()).detach(), expected, rtol=1e-5, atol=1e-5)
    if case == "frod":
        with pytest.raises(
            ll.MergeError, match=r"PEFT makes U of the base and of a V of its own when it loads a folder"
        ):
            ll.export_peft(ours, tmp_path / "ours")
        return
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(token_ids()).detach(), expected, rtol=1e-5, atol=1e-5)
    again = net()
    ll.import_peft(again, tmp_path / "ours")
    torch.testing.assert_close(again(token_ids()).detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if "saved" not in case and "alone" not in case])
def test_gradients(case: str, tmp_path: Path) -> None:
    pairs, config, fields = CASES[case]
    model = theirs(config, fields)
    model.save_pretrained(tmp_path / "theirs")
    ours = net()
    adapter = ll.import_peft(ours, tmp_path / "theirs")
    for one in (model, ours):
        one(token_ids()).square().mean().backward()
    compared = 0
    for path, target in adapter.layers().items():
        for their, own in pairs(model.base_model.model.get_submodule(path), target.params):
            assert their.grad is not None
            assert own.grad is not None
            grad = own.grad if their.shape == own.shape else own.grad.T  # of Lily's B
            torch.testing.assert_close(grad, their.grad, rtol=1e-4, atol=1e-6)
            assert float(their.grad.abs().max()) > 0
            compared += 1
    assert compared >= len(adapter.layers())


def test_pvera_draws_as_peft_does(tmp_path: Path) -> None:
    model = theirs(peft.PveraConfig, {"r": 4})
    model.save_pretrained(tmp_path / "theirs")
    ours = net()
    ll.import_peft(ours, tmp_path / "theirs")
    outputs = []
    for one in (model.train(), ours.train()):
        torch.manual_seed(5)
        outputs.append(one(token_ids()).detach())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], ours.eval()(token_ids()), atol=1e-3)


@pytest.mark.parametrize("name", ["vera", "pvera", "randlora"])
def test_corners_of_one_pair_are_what_peft_has(name: str, tmp_path: Path) -> None:
    """Layers of three sizes; without them it is refused."""
    model = net()
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=name, r=4, corners=True, target_names=tuple(TARGETS)))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    ll.export_peft(model, tmp_path / "ours")
    other = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(other(token_ids()), model(token_ids()), rtol=1e-4, atol=1e-4)
    model = net()
    ll.attach(model, ll.LoraLiteConfig(variant=name, r=4, target_names=tuple(TARGETS)))
    with pytest.raises(
        ll.MergeError, match=r"PEFT keeps base_model\.\w+_[AB] once for all layers, and these layers have"
    ):
        ll.export_peft(model, tmp_path / "none")


@pytest.mark.parametrize("name", ["vb_lora", "uni_lora", "tinylora", "lily"])
def test_adapters_of_ours_in_peft(name: str, tmp_path: Path) -> None:
    model = net()
    own = {"vb_lora": {"vector_length": 8}, "lily": {"stride": 2}}.get(name, {})
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=name, r=2, target_names=tuple(TARGETS), **own))
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    ll.export_peft(model, tmp_path / "ours")
    other = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(other(token_ids()), model(token_ids()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields", [{}, {"weight_tying": 1.0}, {"save_projection": False, "fan_in_fan_out": True}], ids=str
)
def test_tinylora_of_weights_that_are_stored_transposed(fields: dict[str, Any], tmp_path: Path) -> None:
    config = peft.TinyLoraConfig(target_modules=["c_attn", "c_proj"], init_weights="uniform", **fields)
    model = peft.get_peft_model(base_of("gpt2"), config).eval()
    model.save_pretrained(tmp_path / "theirs")
    expected, ours = outputs(model), base_of("gpt2")
    assert float((expected - outputs(ours)).abs().max()) > 1e-3, "it does something"
    ll.import_peft(ours, tmp_path / "theirs")
    torch.testing.assert_close(outputs(ours), expected, rtol=1e-5, atol=1e-6)
    ll.export_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base_of("gpt2"), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(back), expected, rtol=1e-5, atol=1e-6)


def test_tinylora_of_convolutions_and_embeddings_is_not_written(tmp_path: Path) -> None:
    for layer in (nn.Conv2d(4, 6, 3), nn.Embedding(6, 4)):
        model = nn.Sequential(layer)
        ll.attach(model, ll.TinyLoRAConfig(target_names=("0",)))
        with pytest.raises(ll.MergeError, match=r"PEFT's TinyLoRA takes nn\.Linear layers, not a"):
            ll.export_peft(model, tmp_path / "none")


REFUSED = {
    "weight_tying": (peft.TinyLoraConfig, {"weight_tying": 0.5}, r"weight_tying=0.5 has 3 vectors for 6 layers, and the file 3"),
    "bases": (peft.RandLoraConfig, {"save_projection": False}, r"save_projection=False: PEFT draws the bases anew, in a number"),
    "basis": (peft.FrodConfig, {"save_projection": False, "progressbar": False}, r"V is determined up to signs alone"),
    "sampling": (peft.PveraConfig, {"sample_at_inference": True}, r"sample_at_inference=True in adapter_config.json is not what"),
    "dropout": (peft.VBLoRAConfig, {**vb, "vblora_dropout": 0.1}, r"vblora_dropout=0.1 in adapter_config.json: variant 'vb_lora'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    config, fields, text = REFUSED[case]
    theirs(config, fields).save_pretrained(tmp_path / "theirs")
    model = net()
    with pytest.raises(ll.AdapterFileError, match=text):
        ll.import_peft(model, tmp_path / "theirs")
    assert not ll.adapters(model)


BROKEN: dict[str, tuple[str, str, Callable[[Tensor], Tensor], str]] = {
    "a vector that the bank has not": (
        "vb_lora, K alone", "logits_A_topk_indices", lambda t: t + 9, r"vblora_logits_A_topk_indices chooses vector \d+ of 10",
    ),
    "a number that θ has not": (
        "uni_lora, places saved", "indices_B", lambda t: t + 100, r"unilora_indices_B names number \d+ of theta_d_length=100",
    ),
    "another basis in one layer": (
        "randlora", "0.up_proj.randlora_A", lambda t: t + 1, r"randlora_A of this layer is not base_model.randlora_A",
    ),
    "places outside of S": ("frod", "frod_s_indices.up_proj", lambda t: t + 16, r"frod_V \(16, 16\) is not square, or frod_s_indices"),
    "an A that is not shared": (
        "lily, two blocks share", "1.up_proj.lily_A.weight", lambda t: t + 1, r"lora_A differs from that of another layer, and",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_do_not_hold_together(case: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    which, ending, change, text = BROKEN[case]
    _, config, fields = CASES[which]
    theirs(config, fields).save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    names = [name for name in held if name.endswith(ending)]
    assert names
    save_file({**held, **{name: change(held[name]) for name in names}}, tmp_path / "adapter_model.safetensors")
    model = net()
    with pytest.raises(ll.AdapterFileError, match=text):
        ll.import_peft(model, tmp_path)
    assert not ll.adapters(model)


def test_directions_that_a_weight_has_not(tmp_path: Path) -> None:
    """PEFT's FRoD trains rounding noise where one layer with more columns than rows is alone of its kind."""
    model = peft.get_peft_model(net(), peft.FrodConfig(target_modules=["0.down_proj"], progressbar=False))
    model.save_pretrained(tmp_path / "fresh")
    ours = net()
    ll.import_peft(ours, tmp_path / "fresh")
    torch.testing.assert_close(ours(token_ids()), net()(token_ids()), rtol=1e-5, atol=1e-5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ll.AdapterFileError, match=r"trains \d+ directions that this layer's weight has not"):
        ll.import_peft(net(), tmp_path / "trained")
