"""HiRA, GLoRA, PEANuT and DEFT against the peft package: from the same tensors, and folders both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from tests.models import Net, token_ids
from tests.oracles import assert_parity, filled, peft_twin

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
MODULES = ["q_proj", "up_proj", "down_proj"]


def ours(variant: str, **fields: Any) -> ll.AdapterConfig:
    return ll.LoraLiteConfig(variant=variant, r=4, **fields)


# Output and gradients, from the same tensors.


def parity(cfg: ll.AdapterConfig, theirs: Any, pairs: Any, bias: bool = True) -> None:
    layer, x = filled(cfg, torch.float32, bias, size=0.3)
    _, inner = peft_twin(layer, theirs)
    names = pairs(layer, inner)
    with torch.no_grad():
        for mine, other in names:
            other.copy_(mine.reshape(other.shape))
    assert_parity(layer, x, inner, names)


def test_hira() -> None:
    def pairs(layer: Any, inner: Any) -> list[tuple[Tensor, Tensor]]:
        return [(getattr(layer, f"lora_{side}"), getattr(inner, f"hira_{side}")["default"]) for side in "AB"]

    parity(ours("hira"), peft.HiraConfig(r=4, target_modules=["0"]), pairs)


@pytest.mark.parametrize(("depth", "act"), [(0, "relu"), (2, "silu"), (1, "gelu")])
def test_peanut(depth: int, act: str) -> None:
    def pairs(layer: Any, inner: Any) -> list[tuple[Tensor, Tensor]]:
        return [(getattr(layer, f"lora_{side}"), getattr(inner, f"peanut_{side}")["default"].weight) for side in "AB"]

    theirs = peft.PeanutConfig(r=4, depth=depth, act_fn=act, scaling=0.5, target_modules=["0"])
    layer, x = filled(ours("peanut", depth=depth, activation=act, scale=0.5), torch.float32, size=0.3)
    _, inner = peft_twin(layer, theirs)
    with torch.no_grad():
        for mine, other in pairs(layer, inner):
            other.copy_(mine)
        for i in range(depth):
            inner.peanut_encoders["default"][i].weight.copy_(layer.lora_E[i])
            inner.peanut_decoders["default"][i].weight.copy_(layer.lora_D[i])
    assert_parity(layer, x, inner, pairs(layer, inner))
    if depth:
        layer.zero_grad()
        layer(x).square().mean().backward()
        inner(x).square().mean().backward()
        for stack, name in ((layer.lora_E, "peanut_encoders"), (layer.lora_D, "peanut_decoders")):
            expected = torch.stack([module.weight.grad for module in getattr(inner, name)["default"]])
            torch.testing.assert_close(stack.grad, expected, rtol=1e-5, atol=1e-5)


FORMS = [
    ("lora", "lora", "constant"),
    ("vector", "vector", "vector"),
    ("constant", "none", "vector"),
    ("none", "lora", "none"),
]


@pytest.mark.parametrize(
    ("forms", "bias"), [*((forms, True) for forms in FORMS), *((forms, False) for forms in FORMS[:3])], ids=str
)
def test_glora(forms: tuple[str, str, str], bias: bool) -> None:
    def pairs(layer: Any, inner: Any) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        for part in "ABCDE":
            module = getattr(inner, f"glora_{part}")["default"]
            for side, name in (("X", ""), ("Xd", "d"), ("Xu", "u")):
                if hasattr(module, side):
                    found.append((getattr(layer, f"lora_{part}{name}"), getattr(module, side)))
        assert len(found) == sum(p.requires_grad for p in layer.parameters())
        return found

    cfg = ours("glora", **dict(zip(("weight", "prompt", "bias"), forms, strict=True)))
    theirs = peft.GloraConfig(r=4, config_A_B=forms[0], config_C=forms[1], config_D_E=forms[2], target_modules=["0"])
    parity(cfg, theirs, pairs, bias)


def with_signs(P: Tensor, decomposition: str) -> tuple[Tensor, Tensor]:
    """Z as Gram-Schmidt makes it, and the signs that turn its columns into those of torch's Q."""
    if decomposition == "relu":
        return P.relu(), torch.ones(P.shape[1])
    Q, T = torch.linalg.qr(P)
    return Q * T.diagonal().sign(), T.diagonal().sign()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("decomposition", ["relu", "qr"])
def test_deft(decomposition: str, bias: bool) -> None:
    """Their P is our P₀ + dP, their R our start, Z₀ᵀ W / s, plus dR, with the signs of their Q's columns: gradients of
    the offsets are those of the sums."""
    layer, x = filled(ours("deft", decomposition=decomposition, alpha=6), torch.float32, bias, size=0.3)
    theirs = peft.DeftConfig(r=4, alpha=6, decomposition_method=decomposition, target_modules=["0"])
    _, inner = peft_twin(layer, theirs)
    P0 = layer.lora_P0.detach()
    (Z0, _), (_, signs) = (with_signs(one, decomposition) for one in (P0, P0 + layer.lora_dP.detach()))
    P, R = inner.deft_P["default"], inner.deft_R["default"]
    with torch.no_grad():
        P.copy_(P0 + layer.lora_dP)
        R.copy_(signs[:, None] * (Z0.T @ layer.weight / 1.5 + layer.lora_dR))
    assert_parity(layer, x, inner, [(layer.lora_dP, P)])
    (ours_,), (others,) = (
        torch.autograd.grad(y(x).square().mean(), p) for y, p in ((layer, layer.lora_dR), (inner, R))
    )
    torch.testing.assert_close(ours_, signs[:, None] * others, rtol=1e-5, atol=1e-5)


def test_deft_starts_where_peft_starts() -> None:
    layer, x = filled(ours("deft"), torch.float32)
    _, inner = peft_twin(layer, peft.DeftConfig(r=4, target_modules=["0"]))
    torch.testing.assert_close(inner(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert float(inner.deft_P["default"].std()) == pytest.approx(float(layer.lora_P0.std()), rel=0.5)


# Folders.


def net(bias: bool = True) -> Net:
    torch.manual_seed(0)
    model = Net(bias=bias)
    del model.config  # which is none of transformers'
    return model


PEFT: dict[str, list[dict[str, Any]]] = {
    "Hira": [{}, {"r": 4, "hira_dropout": 0.2, "init_weights": "gaussian"}, {"r": 4, "rank_pattern": {"q_proj": 2}}],
    "Peanut": [{}, {"r": 4, "depth": 2, "act_fn": "gelu_new", "scaling": 0.3}, {"r": 4, "act_fn": "swish"}],
    "Glora": [{}, *({"r": 4, "config_A_B": a, "config_C": c, "config_D_E": d} for a, c, d in FORMS)],
    "Deft": [{}, {"r": 4, "decomposition_method": "qr", "alpha": 6}, {"r": 20, "alpha": 5, "deft_dropout": 0.1}],
}
FOLDERS = [(name, fields) for name, each in PEFT.items() for fields in each]


@pytest.mark.parametrize(("name", "fields"), FOLDERS, ids=str)
def test_folders_of_peft_both_ways(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(), getattr(peft, f"{name}Config")(target_modules=MODULES, **fields)).eval()
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(token_ids()).detach()
    model = net()
    frozen = model(token_ids()).detach()
    adapter = ll.import_peft(model, tmp_path / "theirs")
    assert not torch.allclose(expected, frozen, atol=1e-2), "it does something"
    torch.testing.assert_close(model.eval()(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)
    assert {target.cfg.variant for target in adapter.layers().values()} == {name.lower()}
    if fields.get("r") == 20:  # PEFT cuts the rank to d_out there and cannot say so in its config
        with pytest.raises(ll.MergeError, match="has r=.*, and PEFT has one for all modules"):
            ll.export_peft(model, tmp_path / "ours")
        return
    ll.export_peft(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)


def test_glora_without_biases(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(bias=False), peft.GloraConfig(target_modules=MODULES)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    model = net(bias=False)
    ll.import_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(model(token_ids()), theirs(token_ids()), rtol=1e-4, atol=1e-5)


def test_hira_of_embeddings(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(), peft.HiraConfig(r=4, target_modules=["embed_tokens", "q_proj"])).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected, model = theirs(token_ids()).detach(), net()
    ll.import_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(model(token_ids()).detach(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ll.MergeError, match="hira_embedding_A of an embedding has no form in PEFT that is known here"):
        ll.export_peft(model, tmp_path / "ours")


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (peft.DeftConfig(r=4, para=True, target_modules=MODULES), "para=True takes a part of the weight out and puts"),
        (peft.PeanutConfig(r=4, act_fn="quick_gelu", target_modules=MODULES), "act_fn='quick_gelu' is none of relu, "),
    ],
)
def test_what_cannot_be_read(theirs: Any, message: str, tmp_path: Path) -> None:
    peft.get_peft_model(net(), theirs).save_pretrained(tmp_path / "theirs")
    model = net()
    with pytest.raises(ll.AdapterFileError, match=message):
        ll.import_peft(model, tmp_path / "theirs")
    assert not ll.adapters(model)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (ours("glora", target_names=("0",)), "PEFT's GLoRA takes nn.Linear layers, not a Conv2d"),
        (ours("peanut", target_names=("0",)), "PEFT's PEANuT takes nn.Linear layers, not a Conv2d"),
        (ours("deft", target_names=("0",)), "PEFT's DEFT takes linear layers, not a Conv2d"),
    ],
    ids=["glora", "peanut", "deft"],
)
def test_what_cannot_be_written(cfg: ll.AdapterConfig, message: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    ll.attach(model, cfg)
    with pytest.raises(ll.MergeError, match=message):
        ll.export_peft(model, tmp_path / "none")


def test_pefts_hira_has_one_rank(tmp_path: Path) -> None:
    """Its config has a rank_pattern that its layers do not follow."""
    theirs = peft.get_peft_model(net(), peft.HiraConfig(r=4, rank_pattern={"q_proj": 2}, target_modules=MODULES))
    assert len(theirs.base_model.model.layers[0].self_attn.q_proj.hira_A["default"]) == 4, "if not, write the pattern"
    model = net()
    ll.attach(model, ours("hira", rank_pattern={"q_proj": 2}))
    with pytest.raises(ll.MergeError, match="has r=4, and PEFT has one for all modules"):
        ll.export_peft(model, tmp_path / "none")


def test_peqa_has_no_folder(tmp_path: Path) -> None:
    model = net()
    ll.attach(model, ll.PEQAConfig())
    with pytest.raises(ll.MergeError, match="variant 'peqa' has no form of its own in PEFT"):
        ll.export_peft(model, tmp_path / "none")
