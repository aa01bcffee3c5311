"""Which adapters act, in which order, how strong, and on which rows: for every variant."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

from .models import net, token_ids, weights_hash
from .test_variants import config
from .usual import NEEDED, OTHERS, SPREAD

IDS = token_ids(7, (6, 5))
NAMES = SPREAD


def put(model: nn.Module, variant: str, name: str = "default", seed: int = 2, **fields: Any) -> ll.Adapter:
    """An adapter that does something; of trainable_tokens rows that are looked up."""
    rows = {"rows": (1, 2, 3, 4, 5, 6), "target_names": ()} if variant == "trainable_tokens" else {}
    data = {"calibration_data": [token_ids(i) for i in range(3)]} if variant == "eva" else {}
    adapter = ll.attach(model, config(variant, **{**rows, **fields}), name=name, **data)
    torch.manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return adapter


@torch.no_grad()
def out(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", NAMES)
def test_strength_0_is_the_base_and_1_the_adapter_bit_for_bit(variant: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    base, before = out(model), weights_hash(model)
    put(model, variant)
    adapted = out(model)
    assert not torch.equal(adapted, base)
    for value in (0, 0.0, torch.tensor(0.0), torch.zeros(6)):
        with ll.strength(model, {"default": value}):
            assert torch.equal(out(model), base)
    for value in (1, torch.tensor(1.0), torch.ones(6)):
        with ll.strength(model, {"default": value}):
            assert torch.equal(out(model), adapted)
    assert torch.equal(out(model), adapted)
    ll.detach(model)
    assert weights_hash(model) == before


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("s", [0.5, -1.0, 2.0])
def test_one_layer_is_scaled_by_the_formula(variant: str, s: float) -> None:
    """y + s · (y_adapted − y), and x + s · (x_adapted − x) of the input's side, in float64."""
    model: Any = net(torch.float64)
    put(model, variant)
    name = next(iter(ll.adapters(model)["default"].layers()))
    layer = model.get_submodule(name)
    x = (
        torch.arange(1, 6)
        if isinstance(layer, nn.Embedding)
        else torch.randn(3, layer.in_features, dtype=torch.float64)
    )
    target = ll.adapters(model)["default"].layers()[name]
    given = {"params": target.params, "cfg": target.cfg, "layer": layer, "training": False}
    moved = x
    if target.variant.forward_input is not None:
        moved = x + s * (target.variant.forward_input({"x": x, **given}) - x)
    expected = ll.base_forward(layer, moved)
    if target.variant.forward is not None:
        expected = expected + s * (target.variant.forward({"x": moved, "y": expected, **given}) - expected)
    with ll.strength(model, {"default": s}):
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_order_is_what_was_asked_for() -> None:
    model = net(torch.float64)
    put(model, "hra", "a"), put(model, "ia3", "b", target_names=("q_proj", "v_proj", "up_proj", "down_proj", "o_proj"))
    both = out(model)
    ll.activate(model, "b", "a")
    turned = out(model)
    ll.activate(model, "a", "b")
    assert torch.equal(out(model), both)
    ll.activate(model, "a")
    first = out(model)
    ll.activate(model)
    assert torch.equal(out(model), out(net(torch.float64)))
    with ll.active(model, "b", "a"):
        assert torch.equal(out(model), turned)
        with ll.disabled(model, "b"):
            assert torch.equal(out(model), first)
    put(model, "lora", "c")  # a fresh one is active
    assert repr(ll.adapters(model)["a"]).endswith(", not active>")
    assert not repr(ll.adapters(model)["c"]).endswith(", not active>")
    assert not torch.equal(turned, both) or not torch.equal(turned, first)


def test_blocks_nest_overlap_and_survive_what_happens_in_them() -> None:
    model = net()
    for number, name in enumerate("abc"):
        put(model, "lora", name, seed=number)
    one = {name: _alone(model, name) for name in "abc"}
    everything = out(model)
    with contextlib.suppress(KeyboardInterrupt), ll.active(model, "a"), ll.strength(model, {"a": 0.0}):
        assert torch.equal(out(model), out(net()))
        raise KeyboardInterrupt
    assert torch.equal(out(model), everything)
    first, second = ll.active(model, "a"), ll.active(model, "b")
    first.__enter__()
    second.__enter__()
    assert torch.equal(out(model), one["b"])
    first.__exit__(None, None, None)
    assert torch.equal(out(model), one["b"])
    second.__exit__(None, None, None)
    assert torch.equal(out(model), everything)
    with ll.disabled(model), ll.active(model, "c"):  # the inner one says it anew
        assert torch.equal(out(model), one["c"])
    with ll.active(model, "c"), ll.disabled(model):
        assert torch.equal(out(model), out(net()))
    ll.activate(model, "b")
    assert all(p.requires_grad for a in ll.adapters(model).values() for _, p in a.named_tensors())
    ll.set_strength(model, {"b": 0.5})
    assert repr(ll.adapters(model)["b"]).endswith(", strength 0.5>")
    half = out(model)
    with ll.strength(model, {"b": 2}):
        assert not torch.equal(out(model), half)
    assert torch.equal(out(model), half)
    ll.set_strength(model, {"b": None})
    assert torch.equal(out(model), one["b"])


def _alone(model: nn.Module, name: str) -> Tensor:
    with ll.active(model, name):
        return out(model)


def test_the_table() -> None:
    model = net()
    put(model, "lora", "style"), put(model, "ia3", "gates")
    ll.activate(model, "gates")
    ll.set_strength(model, {"gates": -0.5, "style": torch.ones(3)})
    lines = str(ll.adapters(model)).splitlines()
    assert lines[0].split() == ["name", "variant", "rank", "layers", "trainable", "active", "strength"]
    assert lines[2].split() == ["style", "lora", "4", "10", "1,408", "no", *["one", "for", "each", "of", "3", "rows"]]
    assert lines[3].split()[:4] == ["gates", "ia3", "–", "10"]
    assert lines[3].split()[5:] == ["1.", "-0.5"]
    ll.detach(model)
    assert str(ll.adapters(model)) == "no adapters"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: ll.activate(m, "stile"), ll.AdapterNameError, r"no adapter is called 'stile'; did you mean 'style'"),
        (
            lambda m: ll.activate(m, "style", "style"),
            ll.AdapterNameError,
            r"'style' stands twice; an adapter acts once",
        ),
        (lambda m: ll.set_strength(m, {"style": float("nan")}), ll.ConfigError, r"strength of 'style': nan; give a f"),
        (lambda m: ll.set_strength(m, {"style": True}), ll.ConfigError, r"strength of 'style': True; give a finite"),
        (
            lambda m: ll.set_strength(m, {"style": torch.ones(2, 2)}),
            ll.ConfigError,
            r"or one for each row of the batch",
        ),
        (lambda m: ll.set_strength(m, {"stile": None}), ll.AdapterNameError, r"did you mean 'style'"),
        (lambda m: ll.routed(m, "style").__enter__(), ll.ConfigError, r"routed: 'style'; give a list"),
        (lambda m: ll.routed(m, []).__enter__(), ll.ConfigError, r"routed: \[\]; give a list"),
        (lambda m: ll.routed(m, ["stile"]).__enter__(), ll.AdapterNameError, r"did you mean 'style'"),
    ],
)
def test_mistakes(call: Callable[..., Any], error: type[Exception], text: str) -> None:
    model = net()
    put(model, "lora", "style")
    before = out(model)
    with pytest.raises(error, match=text):
        call(model)
    assert torch.equal(out(model), before)


def test_lengths_that_no_batch_has() -> None:
    model = net()
    put(model, "lora", "style")
    with (
        ll.routed(model, ["style", None, None, None]),
        pytest.raises(ll.ModelStateError, match=r"each of 4 rows, and l"),
    ):
        out(model)
    with (
        ll.strength(model, {"style": torch.ones(4)}),
        pytest.raises(ll.ModelStateError, match=r"of 4 rows, and layers"),
    ):
        out(model)
    with (
        ll.strength(model, {"style": torch.ones(3)}),
        ll.routed(model, ["style"] * 6),
        pytest.raises(ll.ModelStateError, match=r"for each of 3 rows, and routed names adapters for 6"),
    ):
        out(model)


@pytest.mark.parametrize("training", [False, True])
def test_rows_equal_single_runs(training: bool) -> None:
    """Every variant, five of one kind (run as one), none, in one batch; outputs and gradients."""
    model = net(torch.float64).train(training)
    names: list[str | None] = [None]
    for number, variant in enumerate([*NAMES, *["lora"] * 5]):
        put(model, variant, f"a{number}", seed=number)
        names.append(f"a{number}")
    names += ["a0", None, "a8"]  # again
    ids = token_ids(3, (len(names), 5))
    alone, gradients = [], {}
    for row, name in enumerate(names):
        with ll.active(model, *([name] if name else [])):
            y = model(ids[row : row + 1])
        alone.append(y.detach())
        if name:
            y.square().sum().backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with ll.routed(model, names):
        y = model(ids)
        y.square().sum().backward()
    torch.testing.assert_close(y.detach(), torch.cat(alone), rtol=1e-9, atol=1e-11)
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", OTHERS)
def test_rows_of_the_others(name: str) -> None:
    model = net(torch.float64)
    try:
        cfg = ll.LoraLiteConfig(variant=name, **NEEDED.get(name, {}))
        adapters = [ll.attach(model, cfg, name=one) for one in ("a", "b")]
    except ll.LoraLiteError as error:
        pytest.skip(f"needs more than a model: {error}")
    model.eval()  # or some draw random numbers
    torch.manual_seed(0)
    for adapter in adapters:
        for parameter in adapter.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    rows = ["a", "b", None, "a"]
    ids = token_ids(3, (4, 5))
    expected = []
    for row, one in enumerate(rows):
        with ll.active(model, *([one] if one else [])):
            expected.append(out(model, ids[row : row + 1]))
    with ll.routed(model, rows):
        torch.testing.assert_close(out(model, ids), torch.cat(expected), rtol=1e-9, atol=1e-10)


def test_what_is_written_inside_a_block_counts(tmp_path: Path) -> None:
    """The tensors of many adapters are put beside each other once in a block, and again when one is written."""
    model = net(torch.float64)
    names = [f"a{number}" for number in range(6)]
    adapters = [put(model, "lora", name, seed=number) for number, name in enumerate(names)]
    adapters[1].save(tmp_path / "one.safetensors")
    seen = []
    with ll.routed(model, names):
        seen += [out(model), out(model)]
        with torch.no_grad():
            next(iter(adapters[3].parameters())).add_(0.1)
        seen.append(out(model))
        ll.load_into(model, tmp_path / "one.safetensors", name="a5")
        seen.append(out(model))
    changed = [[row for row in range(6) if not torch.equal(a[row], b[row])] for a, b in itertools.pairwise(seen)]
    assert changed == [[], [3], [5]]
    for row, name in enumerate(names):
        with ll.active(model, name):
            torch.testing.assert_close(seen[-1][row : row + 1], out(model, IDS[row : row + 1]), rtol=1e-9, atol=1e-11)


def test_rows_of_convolutions_and_flattened_tokens() -> None:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 6)

        def forward(self, image: Tensor) -> Tensor:
            x = self.conv(image)
            return self.fc(x.flatten(2).transpose(1, 2).flatten(0, 1)).unflatten(0, (len(image), -1))

    torch.manual_seed(0)
    model, image = Vision().double(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    for name, variant in {"a": "lora", "b": "dora", "c": "hra"}.items():
        for parameter in ll.attach(model, config(variant, r=2), name=name).parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    rows = ["b", None, "a", "c"]
    alone = []
    for row, name in enumerate(rows):
        with ll.active(model, *([name] if name else [])):
            alone.append(out(model, image[row : row + 1]))
    with ll.routed(model, rows):
        torch.testing.assert_close(out(model, image), torch.cat(alone), rtol=1e-9, atol=1e-11)
    with ll.strength(model, {"a": torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)}), ll.active(model, "a"):
        torch.testing.assert_close(out(model, image)[2:3], alone[2], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_outside_of_all_blocks(how: Callable[..., Any]) -> None:
    model = net()
    put(model, "lora", "a"), put(model, "hra", "b")
    ll.activate(model, "b", "a")
    ll.set_strength(model, {"a": 0.5})
    expected = out(model)
    with ll.active(model, "a"), ll.strength(model, {"a": 3.0}), ll.routed(model, ["a"] * 6):
        copied = how(model)
    assert torch.equal(out(copied), expected)
    ll.activate(copied, "a")
    assert torch.equal(out(model), expected)


def test_one_head_for_each_task(tmp_path: Path) -> None:
    model = net()
    own = model.lm_head.weight
    base = out(model)
    put(model, "lora", "a", train_modules=("lm_head",))
    first = out(model)
    with pytest.raises(
        ll.TargetError, match=r"lm_head.weight is trained whole by adapter 'a' already .*: activate\(model"
    ):
        put(model, "lora", "b", train_modules=("lm_head",))
    ll.activate(model)
    assert torch.equal(out(model), base)
    assert model.lm_head.weight is own
    put(model, "hra", "b", train_modules=("lm_head",))
    second = out(model)
    for _ in range(2):
        for name, expected in {"a": first, "b": second}.items():
            ll.activate(model, name)
            assert torch.equal(out(model), expected)
            with ll.disabled(model):
                assert torch.equal(out(model), base)
    with pytest.raises(ll.ModelStateError, match=r"adapters 'a' and 'b' both train lm_head.weight whole; one of them"):
        ll.activate(model, "a", "b")
    for name, expected in {"a": first, "b": second}.items():  # also while it is not active
        ll.save(model, tmp_path / f"{name}.safetensors", name=name)
        fresh = net()
        ll.load(fresh, tmp_path / f"{name}.safetensors")
        assert torch.equal(out(fresh), expected)
    for call in (lambda: ll.set_strength(model, {"a": 0.5}), lambda: ll.routed(model, ["a"] * 6).__enter__()):
        with pytest.raises(ll.ModelStateError, match=r"adapter 'a' trains lm_head.weight whole, which"):
            call()
    ll.detach(model)
    assert model.lm_head.weight is own
    assert torch.equal(out(model), base)


def test_merge_and_export_respect_strength(tmp_path: Path) -> None:
    model = net()
    put(model, "lora", "a")
    ll.set_strength(model, {"a": -0.5})
    expected = out(model)
    with ll.merged(model):
        torch.testing.assert_close(out(model), expected, rtol=1e-5, atol=1e-6)
    with ll.strength(model, {"a": torch.ones(6)}), pytest.raises(ll.MergeError, match=r"a strength for each row"):
        ll.merged(model).__enter__()
    ll.merge(model)
    torch.testing.assert_close(out(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_graphs_of_a_compiled_model() -> None:
    """One more graph for each state that is new, none for one that comes again, none for another number."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = net()
    for number, name in enumerate("ab"):
        put(model, "lora", name, seed=number)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    states: list[Callable[[], Any]] = [
        lambda: ll.active(model, "a", "b"),
        lambda: ll.active(model, "a"),
        lambda: ll.active(model, "b"),
        lambda: ll.active(model, "b", "a"),
        lambda: ll.disabled(model),
        lambda: ll.strength(model, {"a": 0.5}),
    ]
    for number, state in enumerate(states, 1):
        with state():
            torch.testing.assert_close(out(compiled), out(model))
        assert counter.frame_count <= number
    seen = counter.frame_count
    for state in (*states, *states):
        with state():
            torch.testing.assert_close(out(compiled), out(model))
    for value in (0.0, -1.0, 0.7, 1.0):
        with ll.strength(model, {"a": value}):
            torch.testing.assert_close(out(compiled), out(model))
    assert counter.frame_count == seen
    with ll.routed(model, ["a", "b", None, "a", "b", "b"]):
        torch.testing.assert_close(out(compiled), out(model))


def test_nothing_is_left_of_many_switches() -> None:
    import gc

    model = net(blocks=1)
    put(model, "lora", "a"), put(model, "lora", "b")

    def switch(times: int) -> None:
        for _ in range(times):
            with ll.active(model, "b"), ll.strength(model, {"b": 0.5}), ll.routed(model, ["a", "b"]):
                pass
            ll.activate(model, "a")
            ll.set_strength(model, {"a": 0.5})

    switch(10)
    gc.collect()
    before = len(gc.get_objects())
    switch(1000)
    gc.collect()
    assert len(gc.get_objects()) - before < 50


@pytest.mark.parametrize("other", NAMES)
def test_one_of_several_is_merged_where_they_add_up(other: str, tmp_path: Path) -> None:
    """Additive ones do not depend on each other, whatever they are attached for; others are refused with a number."""
    additive = other in ("lora", "pissa", "lora_xs", "delora", "ssvd", "antipasto", "eva")
    model = net(torch.float64)
    put(model, "lora", "a")
    put(model, other, "b", seed=3)
    both, ours = out(model), _alone(model, "a")
    if not additive:
        # rows of trainable_tokens are added to whatever is there: what stays then does not depend on them
        for name in ("a",) if other == "trainable_tokens" else ("a", "b"):
            with pytest.raises(ll.MergeError, match=r"depends on the other \(\d\.\de[+-]\d\d of the change is their"):
                ll.merged(model, name).__enter__()
        assert torch.equal(out(model), both)
        return
    with ll.merged(model, "a"):
        torch.testing.assert_close(out(model), both, rtol=1e-6, atol=1e-8)
    ll.activate(model, "a")
    ll.merge(model)  # what is active
    assert list(ll.adapters(model)) == ["b"]
    torch.testing.assert_close(out(model), ours, rtol=1e-6, atol=1e-8)
    ll.activate(model, "b")
    torch.testing.assert_close(out(model), both, rtol=1e-6, atol=1e-8)
