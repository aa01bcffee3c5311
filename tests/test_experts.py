"""Fused experts as linear layers, in every way that they are run, against the same experts as separate layers."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite_core.attached.targets.experts import single

from .experts import IDS, IMPLEMENTATIONS, MODELS, fused_in, model, separate
from .usual import SPREAD

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' and peft's own
FILE = "adapter.safetensors"
SMALLER: dict[str, dict[str, Any]] = {"oft": {"block_size": 4}, "antipasto": {"r": 4}, "ssvd": {"r": 4}}
NAMES = [name for name in SPREAD if "experts" in ll.get_variant(name).layers]
WAYS = [(name, way) for name in MODELS for way in (IMPLEMENTATIONS if name != "llama4" else ("eager",))]


def config(name: str, **fields: Any) -> ll.AdapterConfig:
    rank = {"r": 4} if issubclass(ll.get_variant(name).Config, ll.RankConfig) else {}
    named = {"target_names": (r"\.experts\.",), **rank, **SMALLER.get(name, {}), **fields}
    return ll.LoraLiteConfig(variant=name, **named)


def attach(base: nn.Module, cfg: ll.AdapterConfig) -> ll.Adapter:
    try:
        return ll.attach(base, cfg)
    except ll.CalibrationError:
        return ll.attach(base, cfg, calibration_data=[{"input_ids": IDS}])


def moved(adapter: ll.Adapter) -> ll.Adapter:
    torch.manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return adapter


def same_values(fused: ll.Adapter, apart: ll.Adapter) -> None:
    """Give the adapter of separate layers what that of the stacks has."""
    layers = apart.layers()
    with torch.no_grad():
        for name, target in fused.layers().items():
            for bare, stack in target.params.items():
                for number, tensor in enumerate(stack):
                    layers[f"{name}.{number}"].params[bare].copy_(tensor)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "eva"])
@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_every_variant_is_what_separate_layers_compute(kind: str, way: str, name: str) -> None:
    dtype = torch.float32 if way == "grouped_mm" else torch.float64  # torch has no other product of groups
    base = model(kind, way, dtype)
    frozen = base(IDS).logits.detach()
    apart = separate(base)
    adapter = attach(base, config(name))
    tolerance = ll.get_variant(name).identity_atol
    assert float((base(IDS).logits - frozen).abs().max().detach()) <= tolerance
    moved(adapter)
    same_values(adapter, attach(apart, config(name, exclude_names=())))
    y, expected = base(IDS).logits, apart(IDS).logits
    assert float((y - frozen).abs().max().detach()) > 1e-4
    close = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(y, expected, **close)
    y.square().mean().backward()
    expected.square().mean().backward()
    layers = ll.adapters(apart)["default"].layers()
    for path, target in adapter.layers().items():
        for bare, stack in target.params.items():
            for number in range(len(stack)) if stack.requires_grad else ():
                theirs = layers[f"{path}.{number}"].params[bare].grad
                mine = torch.zeros_like(stack[number]) if stack.grad is None else stack.grad[number]
                torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, **close)
    with ll.disabled(base):
        assert torch.equal(base(IDS).logits, frozen)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "eva"])
def test_files_copies_and_merging(name: str, tmp_path: Path) -> None:
    base = model("gpt_oss" if name not in ("ia3_ff",) else "mixtral")
    kind = "gpt_oss" if name not in ("ia3_ff",) else "mixtral"
    moved(attach(base, config(name)))
    y = base(IDS).logits.detach()
    ll.save(base, tmp_path / FILE)
    again = model(kind, "batched_mm")
    ll.load(again, tmp_path / FILE, name="other")
    torch.testing.assert_close(again(IDS).logits.detach(), y, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(base)(IDS).logits.detach(), y)
    torch.testing.assert_close(pickle.loads(pickle.dumps(base))(IDS).logits.detach(), y)
    own = [parameter for parameter in base.parameters() if parameter.ndim == 3 and not parameter.requires_grad]
    with ll.merged(base):
        torch.testing.assert_close(base(IDS).logits.detach(), y, rtol=1e-6, atol=1e-8)
    now = [parameter for parameter in base.parameters() if parameter.ndim == 3 and not parameter.requires_grad]
    assert all(a is b for a, b in zip(own, now, strict=True))
    ll.merge(base)
    assert not ll.adapters(base)
    torch.testing.assert_close(base(IDS).logits, y, rtol=1e-6, atol=1e-8)
    assert all(not name.rpartition(".")[2].startswith("lora_") for name, _ in base.named_parameters())


def test_defaults_leave_experts_alone_and_names_find_them() -> None:
    base = model("mixtral")
    assert not any("experts" in name for name in ll.attach(base, ll.LoraLiteConfig(variant="lora", r=2)).targets)
    ll.detach(base)
    parts = ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")
    adapter = ll.attach(base, config("lora"))
    assert adapter.targets == parts
    shapes = {name: tuple(t.shape) for name, t in adapter.named_tensors()}
    assert shapes[f"{parts[0]}.lora_A"] == (4, 4, 16)
    assert shapes[f"{parts[1]}.lora_B"] == (4, 16, 4)
    assert "lora, r=4, 2 layers, 896 trainable parameters" in repr(adapter)


def test_the_statistics_of_every_expert_and_its_gradient() -> None:
    base = model("mixtral")
    ids = torch.randint(0, 20, (8, 40), generator=torch.Generator().manual_seed(3))
    adapter = ll.attach(base, config("eva", r=2), calibration_data=[{"input_ids": ids}])
    apart = separate(model("mixtral"))
    theirs = ll.attach(apart, config("eva", r=2, exclude_names=()), calibration_data=[{"input_ids": ids}]).layers()
    for name, target in adapter.layers().items():
        for number, A in enumerate(target.params["lora_A"]):
            other = theirs[f"{name}.{number}"].params["lora_A"]
            torch.testing.assert_close(A.detach().abs(), other.detach().abs(), rtol=1e-5, atol=1e-7)
    batch = {"input_ids": ids, "labels": ids}
    targets = [one for target in adapter.layers().values() for one in single(target)]
    with ll.disabled(base):
        found = ll.collect_gradients(base, targets, [batch])
    base.requires_grad_(True)
    with ll.disabled(base):
        base(**batch).loss.backward()
    stack = base.model.layers[0].mlp.experts.down_proj.grad
    for number in range(4):
        torch.testing.assert_close(found[f"{adapter.targets[1]}.{number}"], stack[number])


COMPILED = [
    (n, w, k)
    for n in ("lora", "dora", "hra", "road")
    for w in ("batched_mm", "grouped_mm")
    for k in ("mixtral", "gpt_oss")
]
QUICK = (("lora", "batched_mm", "mixtral"),)


@pytest.mark.parametrize(
    ("name", "way", "kind"),
    [one if one in QUICK else pytest.param(*one, marks=pytest.mark.slow) for one in COMPILED],
)
def test_compiled_in_one_graph_and_in_bfloat16(name: str, way: str, kind: str) -> None:
    base = model(kind, way, torch.float32)
    moved(attach(base, config(name)))
    y = base(IDS).logits.detach()
    torch.compiler.reset()
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits.detach(), y, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(base(IDS).logits.detach().float(), y, rtol=0.2, atol=0.2)
    low = base.bfloat16()(IDS).logits
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_two_adapters_checkpointing_and_training_of_one_part(way: str) -> None:
    base = model("gpt_oss", way, torch.float32)
    moved(ll.attach(base, config("lora")))
    moved(ll.attach(base, config("ia3"), name="second"))
    apart = separate(model("gpt_oss", way, torch.float32))
    one, two = (ll.adapters(base)[name] for name in ("default", "second"))
    same_values(one, ll.attach(apart, config("lora", exclude_names=())))
    same_values(two, ll.attach(apart, config("ia3", exclude_names=()), name="second"))
    y = base(IDS).logits
    torch.testing.assert_close(y, apart(IDS).logits, rtol=1e-4, atol=1e-5)
    y.square().mean().backward()
    grads = [parameter.grad.clone() for parameter in one.parameters()]
    base.zero_grad()
    base.train()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base(IDS).logits.square().mean().backward()
    for parameter, grad in zip(one.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-7)
    ll.detach(base)
    adapter = ll.attach(base, config("lora", target_names=("gate_up_proj",)))
    assert adapter.targets == ("model.layers.0.mlp.experts.gate_up_proj",)
    assert torch.isfinite(base(IDS).logits).all()


def plain(module: nn.Module) -> bool:
    return not any(name in vars(module) for name in ("gate_up_proj", "down_proj", "_lora_lite_open"))


def test_nothing_is_left_after_a_forward_that_failed_or_was_interrupted() -> None:
    base = model("mixtral")
    moved(ll.attach(base, config("lora")))
    experts = base.model.layers[0].mlp.experts
    y = base(IDS).logits.detach()
    act = experts.act_fn
    for error in (RuntimeError, KeyboardInterrupt):

        class Fails(nn.Module):
            def forward(self, x: Tensor, error: Any = error) -> Tensor:
                raise error("on purpose")

        experts.act_fn = Fails()
        with pytest.raises(error, match="on purpose"):
            base(IDS)
        experts.act_fn = act
        torch.testing.assert_close(base(IDS).logits.detach(), y)
        assert plain(experts)
        assert type(experts.down_proj) is nn.Parameter


def test_many_threads_run_the_same_experts() -> None:
    base = model("mixtral", "batched_mm")
    moved(ll.attach(base, config("lora")))
    y, wrong = base(IDS).logits.detach(), list[float]()

    def run() -> None:
        for _ in range(20):
            wrong.append(float((base(IDS).logits.detach() - y).abs().max()))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(wrong) < 1e-12
    assert plain(base.model.layers[0].mlp.experts)


class Odd(nn.Module):
    """Experts of another make."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 6))
        self.other = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x) + torch.einsum("nd,eod->neo", x, self.w).sum(1).sum(1, keepdim=True)


def test_what_is_not_known_is_an_error() -> None:
    base = nn.Sequential(Odd())
    cfg = ll.LoraLiteConfig(variant="lora", r=2, target_names=(r"0\.w",))
    with pytest.raises(
        ll.UnsupportedLayer, match=r"Odd does not say whether its experts .* set `is_transposed = False`"
    ):
        ll.attach(base, cfg)
    base[0].is_transposed = False
    ll.attach(base, cfg)
    with pytest.raises(ll.UnsupportedLayer, match=r"a Odd uses its w in a way \('einsum'\) that adapters on it do not"):
        base(torch.randn(2, 6))
    assert type(base[0].w) is nn.Parameter

    class Unused(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return self.other(x)

    base[0].__class__ = Unused
    with pytest.raises(ll.UnsupportedLayer, match=r"a Unused ran without multiplying by its w, so that adapters on it"):
        base(torch.randn(2, 6))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_peft_computes_the_same_both_ways(kind: str, tmp_path: Path) -> None:
    base = model(kind, dtype=torch.float32)
    moved(ll.attach(base, config("lora", alpha=8)))
    y = base(IDS).logits.detach()
    ll.export_peft(base, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model(kind, dtype=torch.float32), tmp_path / "ours")
    torch.testing.assert_close(theirs(input_ids=IDS).logits, y, rtol=1e-3, atol=1e-5)
    ll.export_lora(base, tmp_path / "as_lora")
    theirs = peft.PeftModel.from_pretrained(model(kind, dtype=torch.float32), tmp_path / "as_lora")
    torch.testing.assert_close(theirs(input_ids=IDS).logits, y, rtol=1e-3, atol=1e-5)
    for parts in (["mlp.experts.down_proj"], ["experts.gate_up_proj", "experts.down_proj"]):
        cfg = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=parts)
        made = peft.get_peft_model(model(kind, dtype=torch.float32), cfg)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
        made.eval().save_pretrained(tmp_path / "theirs")
        back = model(kind, dtype=torch.float32)
        assert len(ll.import_peft(back, tmp_path / "theirs").targets) >= len(parts)
        torch.testing.assert_close(back(IDS).logits, made(input_ids=IDS).logits, rtol=1e-3, atol=1e-5)


def test_coverage_says_what_else_there_is() -> None:
    base = model("mixtral", "batched_mm")
    before = ll.coverage(base, IDS)
    parts = [f"model.layers.0.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    assert before.others == {**dict.fromkeys(["model.embed_tokens"], "embedding"), **dict.fromkeys(parts, "experts")}
    assert "by name also: model.embed_tokens (embedding), " in repr(before)
    ll.attach(base, config("lora"))
    after = ll.coverage(base, IDS)
    assert after.fired == tuple(parts)
    assert after.others == {"model.embed_tokens": "embedding"}
    assert after.total == before.total == sum(p.numel() for name, p in base.named_parameters() if "lora_" not in name)
    assert after.reached - before.reached == sum(base.get_parameter(part).numel() for part in parts)


def test_what_peft_has_not_for_experts(tmp_path: Path) -> None:
    for name, fields, message in (
        ("lora", {"dropout": 0.1}, "PEFT has no dropout for fused experts; set it to 0"),
        ("dora", {}, "PEFT has no more than LoRA for fused experts"),
        ("ia3", {}, "PEFT has no more than LoRA for fused experts"),
    ):
        base = model("mixtral")
        ll.attach(base, config(name, **fields))
        with pytest.raises(ll.MergeError, match=message):
            ll.export_peft(base, tmp_path / "none")
    assert not fused_in(separate(model("mixtral")))
