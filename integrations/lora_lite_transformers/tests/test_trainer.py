"""transformers' Trainer: adapter-only checkpoints, resuming, the best model, quantised bases, the loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lite_transformers import AdapterTrainer, adapter_trainer
from transformers import Trainer, TrainingArguments

import lora_lite as ll

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' and torch's own
FIELDS = TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"


class AdaptedTrainer(AdapterTrainer, Trainer):
    pass


class Rows(torch.utils.data.Dataset):
    """Rows of token ids that are their own labels."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(3, 100, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def arguments(folder: Path, steps: int = 4, **more: Any) -> TrainingArguments:
    fields = {"per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, **more}
    return TrainingArguments(
        str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **fields
    )  # fmt: skip


def trainer(model: Any, folder: Path, steps: int = 4, kind: Any = AdaptedTrainer, **more: Any) -> Any:
    return kind(model, arguments(folder, steps, **more), train_dataset=Rows(), eval_dataset=Rows())


def hra(model: Any, name: str = "default", **fields: Any) -> Any:
    ll.attach(model, ll.HRAConfig(**{"r": 2, **fields}), name=name)
    return model


def values(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in ll.adapters(model)[name].named_tensors()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, msg=key)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def mixed(model: Any, folder: Path, *rest: Any, **more: Any) -> Any:
    return trainer(model, folder, *rest, **more)


def made(model: Any, folder: Path, *rest: Any, **more: Any) -> Any:
    return adapter_trainer(trainer(model, folder, *rest, kind=Trainer, **more))


@pytest.mark.parametrize("way", [mixed, made])
def test_checkpoints_hold_the_adapter_alone_and_resume(way: Any, llama: Any, ids: Any, tmp_path: Path) -> None:
    whole = hra(llama())
    way(whole, tmp_path / "whole").train()
    checkpoint = tmp_path / "whole/checkpoint-2"
    assert files(checkpoint) == {
        "adapters/default.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json",
        "training_args.bin",
    }  # fmt: skip
    again = llama()
    ll.load(again, tmp_path / "whole/checkpoint-4")
    assert torch.equal(again(ids).logits, whole.eval()(ids).logits)
    resumed = hra(llama())
    way(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    assert_equal(values(resumed), values(whole))


def test_a_plain_trainer_refuses_them_aloud_and_resumes_from_its_own(llama: Any, tmp_path: Path) -> None:
    trainer(hra(llama()), tmp_path / "ours", steps=2).train()
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trainer(hra(llama()), tmp_path / "a", kind=Trainer).train(
            resume_from_checkpoint=str(tmp_path / "ours/checkpoint-2")
        )
    whole, resumed = hra(llama()), hra(llama())
    trainer(whole, tmp_path / "theirs", kind=Trainer).train()
    checkpoint = tmp_path / "theirs/checkpoint-2"
    trainer(resumed, tmp_path / "b", kind=Trainer).train(resume_from_checkpoint=str(checkpoint))
    assert_equal(values(resumed), values(whole))
    ours = llama()  # its checkpoints hold the adapter's own file beside
    ll.load(ours, tmp_path / "theirs/checkpoint-4")
    assert_equal(values(ours), values(whole))
    with pytest.raises(ValueError, match="different number of parameter groups"):  # the optimizer is another one
        trainer(hra(llama()), tmp_path / "c").train(resume_from_checkpoint=str(checkpoint))


OTHERS = {
    "variant": (0, ll.AdapterFileError, lambda m: ll.attach(m, ll.LoRAConfig(r=2)), "holds variant 'hra', and adapter 'default' is a 'lora'; attach what the checkpoint was trained with"),
    "rank": (0, ll.AdapterFileError, lambda m: hra(m, r=4), "was trained with r=2, and adapter 'default' has r=4"),
    "layers": (0, ll.AdapterFileError, lambda m: hra(m, target_names=("q_proj",)), "is on other layers than adapter 'default'"),
    "name": (0, ll.AdapterFileError, lambda m: hra(m, "style"), "  in it: default\n  on the model: style"),
    "one more": (0, ll.AdapterFileError, lambda m: hra(hra(m), "style"), "  in it: default\n  on the model: default, style"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_resuming_with_something_else(other: str, llama: Any, tmp_path: Path) -> None:
    seed, error, attach, message = OTHERS[other]
    trainer(hra(llama()), tmp_path, steps=2).train()
    model = llama(seed)
    attach(model)
    before = {name: values(model, name) for name in ll.adapters(model)}
    with pytest.raises(error) as caught:
        trainer(model, tmp_path).train(resume_from_checkpoint=True)
    assert message in str(caught.value)
    for name in before:
        assert_equal(values(model, name), before[name])


def test_resuming_with_another_alpha_or_base(llama: Any, tmp_path: Path) -> None:
    def make(seed: int = 0, **fields: Any) -> Any:
        model = llama(seed)
        ll.attach(model, ll.PiSSAConfig(r=2, **fields))
        return model

    trainer(make(), tmp_path, steps=2).train()
    with pytest.raises(
        ll.BaseMismatch, match="checkpoint-2/adapters/default.safetensors was made on another base model"
    ):
        trainer(make(1), tmp_path).train(resume_from_checkpoint=True)
    model = llama()
    ll.attach(model, ll.LoRAConfig(r=2, alpha=1))
    trainer(model, tmp_path / "lora", steps=2).train()
    model = llama()
    ll.attach(model, ll.LoRAConfig(r=2, alpha=64))
    with pytest.raises(ll.AdapterFileError, match="was trained with alpha=1(.0)?, and adapter 'default' has alpha=64"):
        trainer(model, tmp_path / "lora").train(resume_from_checkpoint=True)


def test_several_adapters_and_one_that_is_detached_meanwhile(llama: Any, tmp_path: Path) -> None:
    def make() -> Any:
        model = hra(llama(), train_modules=("lm_head",))
        ll.attach(model, ll.IA3Config(), name="gates")
        return model

    whole, resumed = make(), make()
    trainer(whole, tmp_path / "a").train()
    trainer(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    (tmp_path / "a/checkpoint-4/adapters/gates.safetensors").unlink()  # or: killed between the two
    with pytest.raises(ll.AdapterFileError, match="in it: default\n  on the model: default, gates"):
        trainer(make(), tmp_path / "c").train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))
    run = trainer(make(), tmp_path / "d", steps=1)
    run.train()
    ll.detach(run.model, "gates")
    with pytest.raises(ll.ModelStateError, match="adapter gates was detached from the model while it was trained"):
        run.train()


def test_a_checkpoint_that_was_cut_short(llama: Any, tmp_path: Path) -> None:
    trainer(hra(llama()), tmp_path).train()
    (tmp_path / "checkpoint-4/trainer_state.json").unlink()
    with pytest.raises(ll.AdapterFileError, match="checkpoint-4 has no trainer_state.json, which is written last"):
        trainer(hra(llama()), tmp_path).train(resume_from_checkpoint=True)
    file = tmp_path / "checkpoint-2/adapters/default.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ll.AdapterFileError):
        trainer(hra(llama()), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    shutil.rmtree(tmp_path / "checkpoint-2/adapters")
    with pytest.raises(ll.AdapterFileError, match="in it: none\n  on the model: default"):
        trainer(hra(llama()), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_model_is_there_at_the_end(llama: Any, ids: Any, tmp_path: Path) -> None:
    model = hra(llama(), train_modules=("lm_head",))
    run = trainer(model, tmp_path, steps=6, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    for group in run.create_optimizer().param_groups:
        group["lr"] = 1.0
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(set(losses)) > 1
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    best = llama()
    ll.load(best, run.state.best_model_checkpoint)
    assert torch.equal(best(ids).logits, model.eval()(ids).logits)
    run.save_model(str(tmp_path / "saved"))
    assert {"adapters/default.safetensors", "training_args.bin"} == files(tmp_path / "saved")


def test_the_optimizer(llama: Any, tmp_path: Path) -> None:
    class Plus(AdaptedTrainer):
        b_ratio = 16.0

    model = llama()
    ll.attach(model, ll.LoRAConfig(r=2))
    ll.attach(model, ll.IA3Config(), name="gates")
    model.model.norm.weight.requires_grad = True
    model.model.embed_tokens.weight.requires_grad = True
    optimizer = trainer(model, tmp_path, kind=Plus, weight_decay=0.1).create_optimizer()
    assert type(optimizer) is torch.optim.AdamW
    told = {
        group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups
    }
    assert told == {
        "matrices": (1e-2, 0.1, 14), "B side": (pytest.approx(0.16), 0.1, 14), "gates": (1e-2, 0.0, 14),
        "others": (1e-2, 0.1, 1), "others without decay": (1e-2, 0.0, 1),
    }  # fmt: skip
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(p.requires_grad for p in model.parameters())


@pytest.fixture
def counted(registered: Any) -> Any:
    """A variant that counts its steps and adds the square of its tensor to the loss."""
    from types import SimpleNamespace

    class Config(ll.AdapterConfig):
        variant = "counted"

    @ll.hookimpl
    def param_specs(d_out: int) -> dict[str, ll.ParamSpec]:
        return {"lora_h": ll.ParamSpec((d_out,), init="ones")}

    @ll.hookimpl
    def forward(y: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        return y + 0 * params["lora_h"]

    @ll.hookimpl
    def penalty(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return (params["lora_h"] ** 2).sum() / 2

    @ll.hookimpl
    def before_step(step: int) -> None:
        pass

    registered(
        SimpleNamespace(Config=Config, param_specs=param_specs, forward=forward, penalty=penalty,
                        before_step=before_step, __name__="counted", __doc__="Counted."), name="counted",
    )  # fmt: skip
    return Config


@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("more", [{}, {"label_smoothing_factor": 0.1}], ids=["", "smoothed"])
def test_the_penalty_counts_once_per_step(
    accumulated: int, more: dict[str, Any], counted: Any, llama: Any, tmp_path: Path
) -> None:
    """Its gradient is the tensor itself, so that SGD with rate 0.1 takes a tenth of it off, whatever is accumulated."""
    model = llama()
    ll.attach(model, counted(target_names=("q_proj",)))
    run = trainer(
        model, tmp_path, steps=2, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, lr_scheduler_type="constant",
        per_device_train_batch_size=4 // accumulated, gradient_accumulation_steps=accumulated, **more,
    )  # fmt: skip
    run.train()
    for value in values(model).values():
        torch.testing.assert_close(value, torch.full_like(value, 0.9**2))
    assert ll.adapters(model)["default"].record.step == 2
    plain = trainer(llama(), tmp_path, kind=Trainer, **more)
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6), "the task's alone"


def test_a_schedule_goes_on(llama: Any, tmp_path: Path) -> None:
    AdaLora = ll.get_variant("adalora").Config

    def run(folder: str, **more: Any) -> Any:
        model = llama()
        ll.attach(model, AdaLora(r=4))
        trainer(model, tmp_path / folder).train(**more)
        return model

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert ll.adapters(resumed)["default"].record.step == 4
    assert_equal(values(resumed), values(whole))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_accepted(bits: int, llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised bases; type: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    llama().save_pretrained(tmp_path / "base")

    def base() -> Any:
        quantised = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised, device_map="cpu")

    model = hra(base())
    with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized models"):
        trainer(model, tmp_path, kind=Trainer)
    run = trainer(model, tmp_path / "run")
    assert "_hf_peft_config_loaded" not in vars(model)
    run.train()
    resumed = hra(base())
    trainer(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert_equal(values(resumed), values(model))
    ll.detach(model)
    with pytest.raises(ll.ModelStateError, match="adapter default was detached from the model while it was trained"):
        run.save_model(str(tmp_path / "x"))


@pytest.mark.parametrize(
    "more",
    [{CHECKPOINTING: True}, {"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}],
    ids=str,
)
def test_ways_to_train(more: dict[str, Any], llama: Any, tmp_path: Path) -> None:
    model = llama()
    ll.attach(model, ll.LoRAConfig(r=2))
    before = values(model)
    trainer(model, tmp_path, **more).train()
    after = values(model)
    assert all(not torch.equal(after[key], before[key]) for key in after)
    again = llama()
    ll.load(again, tmp_path / "checkpoint-4")
    assert_equal(values(again), after)


def test_what_is_not_a_trainer_with_adapters(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ll.ModelStateError, match=r"the LlamaForCausalLM carries no adapter; type ll.attach\("):
        trainer(llama(), tmp_path)
    plain = trainer(llama(), tmp_path, kind=Trainer)
    with pytest.raises(ll.ModelStateError, match="carries no adapter"):
        adapter_trainer(plain)
    assert type(plain) is Trainer
    with pytest.raises(ll.ModelStateError, match="takes a transformers Trainer, not int"):
        adapter_trainer(3)  # type: ignore[type-var]
    ours = trainer(hra(llama()), tmp_path)
    assert adapter_trainer(ours) is ours


def test_groups_that_another_one_has_made(llama: Any, tmp_path: Path) -> None:
    """As sentence-transformers' trainer makes them, of its loss, whose own parameters stay in them: gates are not decayed."""

    class Grouped(AdaptedTrainer):
        def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
            kind, fields = super().get_optimizer_cls_and_kwargs(args, model)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return kind, {**fields, "optimizer_dict": [{"params": [*trained, of_the_loss], "weight_decay": 0.1}]}

    of_the_loss = torch.nn.Parameter(torch.zeros(3))
    model = llama()
    ll.attach(model, ll.DoRAConfig(r=2))
    optimizer = trainer(model, tmp_path, kind=Grouped, weight_decay=0.1).create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.pop(id(of_the_loss)) == 0.1
    tensors = {name: p for name, p in ll.adapters(model)["default"].named_tensors() if p.requires_grad}
    assert decay == {id(p): 0.1 if p.ndim > 1 else 0.0 for p in tensors.values()}
    assert set(decay.values()) == {0.0, 0.1}


def test_an_optimizer_of_ones_own_is_followed(llama: Any, counted: Any, tmp_path: Path) -> None:
    model = llama()
    ll.attach(model, counted(target_names=("q_proj",)))
    own = torch.optim.SGD(ll.param_groups(model, lr=0.1))
    AdaptedTrainer(model, arguments(tmp_path, 2), train_dataset=Rows(), optimizers=(own, None)).train()
    assert ll.adapters(model)["default"].record.step == 2
    state = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 2
