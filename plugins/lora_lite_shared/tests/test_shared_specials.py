"""What is particular to a method: what is shared and how much, how it starts, what it refuses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from tests.models import Net, net, token_ids

FILE = "adapter.safetensors"


def config(name: str, **fields: Any) -> ll.AdapterConfig:
    return ll.LoraLiteConfig(variant=name, **fields)


def on_model(model: nn.Module) -> set[str]:
    return {name for name in (*model._parameters, *model._buffers) if name.startswith("lora_")}


def trained(adapter: ll.Adapter) -> int:
    return sum(parameter.numel() for parameter in adapter.parameters())


@pytest.mark.parametrize(("name", "own"), [("vera", 4), ("pvera", 8)])
def test_memory_and_file_grow_by_vectors_only(name: str, own: int, tmp_path: Path) -> None:
    """Two blocks more are ten layers more, each with its two vectors; the pairs stay what they were."""
    numbers, held = [], []
    for blocks in (2, 4, 6):
        model = net(blocks=blocks)
        adapter = ll.attach(model, config(name, r=4))
        ll.save(model, tmp_path / FILE)
        numbers.append(sum(tensor.numel() for _, tensor in adapter.named_tensors()))
        held.append(sum(torch.Size(shape).numel() for _, shape in ll.inspect(tmp_path / FILE).tensors.values()))
        assert len(on_model(model)) == 4
    assert held == numbers
    vectors = 2 * sum(own + d_out for d_out in (16, 16, 16, 24, 16))
    assert [more - less for less, more in itertools.pairwise(numbers)] == [vectors, vectors]


@pytest.mark.parametrize("name", ["vera", "pvera"])
def test_the_projections_of_vera(name: str) -> None:
    model = nn.Sequential(nn.Linear(600, 400))
    ll.attach(model, config(name, r=50))
    for tensor in (model._parameters[one] for one in on_model(model)):
        bound = (6 / tensor.shape[1]) ** 0.5
        assert 0.99 * bound < float(tensor.abs().max()) <= bound
        assert not tensor.requires_grad


def test_corners_are_parts_of_the_largest() -> None:
    for name in ("vera", "pvera", "randlora"):
        model = net()
        adapter = ll.attach(model, config(name, r=4, corners=True, target_names=("up_proj", "q_proj")))
        p = adapter.layers()
        up, q = (p[f"layers.0.{one}"].params for one in ("up_proj", "self_attn.q_proj"))
        assert torch.equal(q["lora_B"], up["lora_B"][:16])
        assert torch.equal(q["lora_A"], up["lora_A"][:, :16])


@pytest.mark.parametrize("name", ["vera", "pvera"])
@pytest.mark.parametrize("d0", [0.0, float("nan"), float("inf")])
def test_a_start_without_gradients(name: str, d0: float) -> None:
    why = "d0 is a finite number" if d0 else "both vectors at 0 would have no gradient"
    with pytest.raises(ll.ConfigError, match=rf"VeRAConfig\(d0={d0!r}\): {why}"):
        config(name, d0=d0)


def test_pvera_is_its_mean_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    adapter = ll.attach(model, config("pvera", r=4))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 8)
    assert torch.equal(model.eval()(x), model(x))
    mean, runs = model(x), torch.stack([model.train()(x).detach() for _ in range(4000)])
    assert float(runs.std(0).min()) > 0.01
    error = (runs.mean(0) - mean).abs() / (runs.std(0) / 4000**0.5)
    assert float(error.detach().max()) < 5


def test_the_pair_of_tied_lora_is_one_and_trained() -> None:
    model = net()
    adapter = ll.attach(model, config("tied_lora", r=4))
    assert trained(adapter) == 2 * 4 * (16 + 24) + 2 * sum(4 + d_out for d_out in (16, 16, 16, 24, 16))
    model(token_ids()).square().mean().backward()
    assert float(model._parameters["lora_B_16x4"].grad.abs().max()) > 0  # type: ignore[union-attr]
    alike = ll.attach(net(), config("tied_lora", r=4, vectors=False))
    assert trained(alike) == 2 * 4 * (16 + 24)


def test_tied_lora_drops_what_it_reads_in_training_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).double()
    x = torch.randn(5, 8).double()
    adapter = ll.attach(model, config("tied_lora", r=4, dropout=0.5, alpha=8.0))
    assert torch.equal(model.train()(x), nn.functional.linear(x, model[0].weight, model[0].bias))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    torch.manual_seed(3)
    got = model(x)
    p = adapter.layers()["0"].params
    A, B = torch.diag(1 + p["lora_u"]) @ p["lora_A"], torch.diag(1 + p["lora_v"]) @ p["lora_B"]
    torch.manual_seed(3)
    seen = nn.functional.dropout(x, 0.5)
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(got, base + 2 * seen @ A.T @ B.T)
    torch.testing.assert_close(model.eval()(x), base + 2 * x @ A.T @ B.T)


def test_the_start_of_vb_lora() -> None:
    model = nn.Sequential(nn.Linear(64, 96))
    adapter = ll.attach(model, config("vb_lora", bound=0.05))
    p = adapter.layers()["0"].params
    assert p["lora_bank"].shape == (256, 32)  # the largest length that divides both
    assert 0.049 < float(p["lora_bank"].detach().abs().max()) <= 0.05
    assert float(p["lora_logits_A"].detach().std()) == pytest.approx(0.1, rel=0.05)
    assert trained(adapter) == 256 * 32 + 4 * 256 * (2 + 3)


def test_sizes_of_vb_lora() -> None:
    with pytest.raises(
        ll.TargetError, match=r"0: VBLoRAConfig\(vector_length=5\) on a layer 24 → 16: \[1, 2, 4, 8\] divide"
    ):
        ll.attach(nn.Sequential(nn.Linear(24, 16)), config("vb_lora", vector_length=5))
    with pytest.raises(ll.ConfigError, match=r"VBLoRAConfig\(topk=9\): from 1 to num_vectors=8"):
        config("vb_lora", topk=9, num_vectors=8)
    for length in (0, -4):
        with pytest.raises(ll.ConfigError, match=rf"VBLoRAConfig\(vector_length={length}\): at least 1, or None"):
            config("vb_lora", vector_length=length)
    with pytest.raises(ll.ConfigError, match=r"VBLoRAConfig\(bound=0.0\): a bank of zeros has no gradient"):
        config("vb_lora", bound=0.0)


def test_vb_lora_goes_on_from_what_peft_keeps_for_inference(tmp_path: Path) -> None:
    """With the same K vectors, and finite gradients."""
    peft = pytest.importorskip("peft")
    theirs = peft.VBLoRAConfig(
        r=2, num_vectors=6, vector_length=8, topk=2, save_only_topk_weights=True, target_modules=["q_proj"]
    )
    base = net()
    del base.config
    peft.get_peft_model(base, theirs).save_pretrained(tmp_path)
    model = net()
    adapter = ll.import_peft(model, tmp_path)
    p = next(iter(adapter.layers().values())).params
    chosen = p["lora_logits_A"].topk(2).indices
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    before = {key: tensor.detach().clone() for key, tensor in adapter.named_tensors()}
    model(token_ids()).square().mean().backward()
    optimizer.step()
    assert all(bool(tensor.isfinite().all()) for _, tensor in adapter.named_tensors())
    assert any(not torch.equal(tensor, before[key]) for key, tensor in adapter.named_tensors())
    assert torch.equal(p["lora_logits_A"].topk(2).indices.sort().values, chosen.sort().values)


@pytest.mark.parametrize("bound", [0.02, 0.5])
def test_the_start_of_uni_lora(bound: float) -> None:
    layer = nn.Linear(60, 40)
    theta = (
        ll.attach(nn.Sequential(layer), config("uni_lora", length=500, bound=bound)).layers()["0"].params["lora_theta"]
    )
    assert 0.98 * bound < float(theta.detach().abs().max()) <= bound
    with pytest.raises(ll.ConfigError, match=r"UniLoRAConfig\(bound=0\): a vector of zeros has no gradient; above 0"):
        config("uni_lora", bound=0)


def test_uni_lora_is_one_vector_and_an_isometry() -> None:
    model = net()
    adapter = ll.attach(model, config("uni_lora", length=60))
    assert trained(adapter) == 60
    counts = torch.zeros(60)
    for target in adapter.layers().values():
        for side in "AB":
            of_one = torch.bincount(target.params[f"lora_I_{side}"].flatten().int(), minlength=60)
            assert int(of_one.max() - of_one.min()) <= 1
            counts += of_one
    torch.testing.assert_close(counts * model._parameters["lora_c_60"].square(), torch.ones(60))  # type: ignore[union-attr]
    model(token_ids()).square().mean().backward()
    assert float(model._parameters["lora_theta_60"].grad.abs().min()) > 0  # type: ignore[union-attr]


def test_long_vectors_of_uni_lora_have_longer_places() -> None:
    for length, dtype in ((2**15 - 1, torch.int16), (2**15, torch.int32)):
        adapter = ll.attach(nn.Sequential(nn.Linear(8, 8)), config("uni_lora", length=length))
        assert adapter.layers()["0"].params["lora_I_A"].dtype == dtype
    with pytest.raises(ll.ConfigError, match=r"UniLoRAConfig\(length=0\): a whole number of at least 1"):
        config("uni_lora", length=0)


@pytest.mark.parametrize("sparse", [True, False])
def test_the_bases_of_randlora_and_the_rank_of_its_change(sparse: bool) -> None:
    layer = nn.Linear(60, 40, dtype=torch.float64)
    adapter = ll.attach(nn.Sequential(layer), config("randlora", r=7, sparse=sparse))
    p = adapter.layers()["0"].params
    assert p["lora_B"].shape == (60, 6, 7)
    assert float(p["lora_B"].var()) == pytest.approx(1, abs=0.1)
    if sparse:
        assert sorted(p["lora_B"].unique().tolist()) == pytest.approx([-(3**0.5), 0, 3**0.5], abs=1e-6)
        assert float((p["lora_B"] == 0).double().mean()) == pytest.approx(2 / 3, abs=0.03)
    p["lora_l"].data.normal_()
    most = int((p["lora_A"] != 0).any(0).sum())  # sparse columns may be empty
    assert most > 30
    for rank in (7, most):  # as long as Γ is what it starts as, the sum is one product
        change = (layer(torch.eye(60).double()) - layer.bias).T - layer.weight
        assert int(torch.linalg.matrix_rank(change)) == rank
        p["lora_g"].data.normal_()


def test_tinylora_starts_in_the_weights_own_directions() -> None:
    layer = nn.Linear(24, 16, dtype=torch.float64)
    adapter = ll.attach(nn.Sequential(layer), config("tinylora", r=3, u=5, dtype="float64"))
    p = adapter.layers()["0"].params
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    torch.testing.assert_close(p["lora_B"] @ p["lora_A"], U[:, :3] * S[:3] @ Vh[:3], rtol=1e-6, atol=1e-7)
    assert trained(adapter) == 5
    assert trained(ll.attach(net(), config("tinylora", u=7, tied=True))) == 7
    assert trained(ll.attach(net(), config("tinylora", u=7))) == 7 * 10
    with pytest.raises(ll.TargetError, match=r"0: TinyLoRAConfig\(r=17\) on a layer 24 → 16: r is at most 16"):
        ll.attach(nn.Sequential(nn.Linear(24, 16)), config("tinylora", r=17))
    with pytest.raises(ll.ConfigError, match=r"TinyLoRAConfig\(u=0\): v has a whole number of entries, at least 1"):
        config("tinylora", u=0)


def test_what_layers_share_in_lily() -> None:
    model = net(blocks=4)
    adapter = ll.attach(model, config("lily", r=4, stride=2, experts=3, target_names=("q_proj", "up_proj")))
    p = {name: target.params for name, target in adapter.layers().items()}
    q = [p[f"layers.{i}.self_attn.q_proj"] for i in range(4)]
    up = [p[f"layers.{i}.up_proj"] for i in range(4)]
    for one in (q, up):
        assert one[0]["lora_A"] is one[1]["lora_A"]
        assert one[2]["lora_A"] is one[3]["lora_A"]
        assert one[0]["lora_A"] is not one[2]["lora_A"]
        assert len({id(each["lora_B"]) for each in one}) == 1
        assert len({id(each["lora_R"]) for each in one}) == 4
    assert q[0]["lora_A"] is not up[0]["lora_A"]
    assert trained(adapter) == 2 * 2 * 4 * 16 + 3 * 4 * (16 + 24) + 8 * 3 * 4


@pytest.mark.parametrize("average", [True, False])
def test_the_mean_over_tokens_of_lily(average: bool) -> None:
    layer = nn.Linear(8, 6).double()
    model = nn.Sequential(layer)
    for parameter in ll.attach(model, config("lily", r=4, average=average)).parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 8).double()
    alone = torch.cat([model(row[None]) for row in x])
    assert torch.allclose(alone, model(x)) is not average
    with pytest.raises(ll.MergeError):
        ll.merge(model)


def test_layers_that_peft_would_share_otherwise(tmp_path: Path) -> None:
    model = net(blocks=4)
    ll.attach(model, config("lily", r=4, stride=2, target_names=("q_proj",), layers=(1, 2, 3)))
    with pytest.raises(
        ll.MergeError,
        match=r"PEFT would share A between layers.1.self_attn.q_proj and layers.2.self_attn.q_proj, which",
    ):
        ll.export_peft(model, tmp_path / "a")
    ll.detach(model)
    ll.attach(model, config("lily", r=4, average=False))
    with pytest.raises(ll.MergeError, match=r"PEFT's Lily mixes by the mean over all tokens \(average=True\)"):
        ll.export_peft(model, tmp_path / "a")
    for fields in ({"stride": 0}, {"experts": 1}):
        with pytest.raises(ll.ConfigError, match=r"a whole number of at least [12]"):
            config("lily", **fields)
    with pytest.raises(ll.ConfigError, match=r"LilyConfig\(scaling=0\): .* a number other than 0"):
        config("lily", scaling=0)


def test_the_basis_of_frod() -> None:
    """V and its inverse are those of all layers of a kind; in it the weight is U Λ₀ Vᵀ."""
    model = net(torch.float64)
    adapter = ll.attach(model, config("frod", sparsity=0.05))
    layers = adapter.layers()
    assert layers["layers.0.up_proj"].params["lora_V"] is layers["layers.1.up_proj"].params["lora_V"]
    assert layers["layers.0.up_proj"].params["lora_V"] is not layers["layers.0.self_attn.q_proj"].params["lora_V"]
    for target in layers.values():
        p = target.params
        V, T, w, weight = p["lora_V"], p["lora_T"], p["lora_w"], ll.dense_weight(target.layer)
        torch.testing.assert_close(V.T @ T, torch.eye(target.d_in).double(), rtol=0, atol=1e-6)
        U = weight @ T * w
        torch.testing.assert_close(U.norm(dim=0), torch.ones(target.d_in).double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(U @ torch.diag(1 / w) @ V.T, weight, rtol=1e-5, atol=1e-6)
        places = p["lora_at"]
        assert len(places) == len(places.unique()) == int(0.05 * target.d_in**2)
        assert not bool((places // target.d_in == places % target.d_in).any())


@pytest.mark.parametrize("ridge", [1e-3, 2.0])
def test_the_directions_of_frods_basis(ridge: float) -> None:
    """V = Rᵀ E, written out: QR of the weights on top of each other, and the inverses of the layers' Gram matrices."""
    model = net(torch.float64)
    cfg: Any = config("frod", ridge=ridge, target_names=("up_proj",), dtype="float64")
    layers = ll.attach(model, cfg).layers()
    weights = [ll.dense_weight(target.layer) for target in layers.values()]
    Q, R = torch.linalg.qr(torch.cat(weights))
    grams = [part.T @ part for part in Q.split([len(weight) for weight in weights])]
    mean = sum((torch.linalg.inv(gram + ridge * torch.eye(len(R)).double()) for gram in grams), torch.zeros_like(R))
    V = R.T @ torch.linalg.eigh(mean / len(grams)).eigenvectors
    ours = next(iter(layers.values())).params["lora_V"]
    torch.testing.assert_close(ours.abs(), V.abs(), rtol=1e-6, atol=1e-8)  # of eigenvectors any sign


def test_frod_where_there_are_fewer_rows_than_columns() -> None:
    layer = nn.Linear(24, 16, dtype=torch.float64)
    adapter = ll.attach(nn.Sequential(layer), config("frod"))
    p = adapter.layers()["0"].params
    torch.testing.assert_close(p["lora_V"].T @ p["lora_T"], torch.eye(24).double(), rtol=0, atol=1e-6)
    assert int((p["lora_w"] == 0).sum()) == 8
    assert trained(adapter) == 24 + 5


def test_shares_of_frod() -> None:
    for fields, text in (({"sparsity": 0.0}, "a share above 0 and at most 1"), ({"ridge": 0.0}, "a number above 0")):
        with pytest.raises(ll.ConfigError, match=text):
            config("frod", **fields)


@pytest.mark.parametrize("name", ["tinylora", "frod"])
def test_a_file_fits_its_base_alone(name: str, tmp_path: Path) -> None:
    model = net()
    ll.attach(model, config(name))
    ll.save(model, tmp_path / FILE)
    with pytest.raises(ll.BaseMismatch):
        ll.load(net(seed=1), tmp_path / FILE)


@pytest.mark.parametrize("name", ["vera", "pvera", "tied_lora", "vb_lora", "randlora", "uni_lora", "tinylora", "frod"])
def test_merged_it_is_the_same(name: str) -> None:
    model: Net = net().eval()
    adapter = ll.attach(model, config(name))
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    expected: Tensor = model(token_ids()).detach()
    ll.merge(model)
    torch.testing.assert_close(model(token_ids()).detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("d_in", "d_out"), [(6, 9), (9, 6)])
def test_randlora_of_many_rows_is_that_of_few(d_in: int, d_out: int) -> None:
    """Λ is put on the matrix, or on what it gives."""
    model = nn.Sequential(nn.Linear(d_in, d_out, dtype=torch.float64))
    for parameter in ll.attach(model, ll.RandLoRAConfig(r=2, alpha=3)).parameters():
        nn.init.normal_(parameter)
    x = torch.randn(20, d_in, dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.cat([model(part) for part in x.split(2)]))
