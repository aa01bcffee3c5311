"""transformers' Trainer: adapter-only checkpoints, resuming, the best model, quantised bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lite_peft import LoraLiteConfig
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import lora_lite as ll

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' and torch's own
HRA = {"variant": "hra", "r": 2, "task_type": "CAUSAL_LM"}


class Rows(torch.utils.data.Dataset):
    """Rows of token ids that are their own labels."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(3, 100, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def trainer(model: Any, folder: Path, steps: int = 4, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **more
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


def values(model: PeftModel) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in ll.adapters(model.get_base_model())["default"].named_tensors()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, msg=key)


def test_checkpoints_hold_the_adapter_alone_and_resume(llama: Any, tmp_path: Path) -> None:
    whole = get_peft_model(llama(), LoraLiteConfig(**HRA))
    trainer(whole, tmp_path / "whole").train()
    checkpoint = tmp_path / "whole/checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 40_000
    assert not (checkpoint / "model.safetensors").exists()
    assert_equal(values(PeftModel.from_pretrained(llama(), tmp_path / "whole/checkpoint-4")), values(whole))
    resumed = get_peft_model(llama(), LoraLiteConfig(**HRA, seed=1))
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    assert_equal(values(resumed), values(whole))


OTHER = {
    "another config": (0, {"variant": "lora", "r": 2, "alpha": 8.0}, ll.AdapterFileError, "holds variant 'hra', and adapter 'default' is a 'lora'"),
    "another rank": (0, {"variant": "hra", "r": 4}, ll.AdapterFileError, "the checkpoint was trained with r=2, and adapter 'default' has r=4"),
    "other layers": (0, {"variant": "hra", "r": 2, "target_names": ("q_proj",)}, ll.AdapterFileError, "is on other layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_resuming_with_something_else(name: str, llama: Any, tmp_path: Path) -> None:
    seed, fields, error, message = OTHER[name]
    trainer(get_peft_model(llama(), LoraLiteConfig(**HRA)), tmp_path, steps=2).train()
    model = get_peft_model(llama(seed), LoraLiteConfig(**fields, task_type="CAUSAL_LM"))
    before = values(model)
    with pytest.raises(error) as caught:
        trainer(model, tmp_path).train(resume_from_checkpoint=True)
    assert message in str(caught.value)
    assert_equal(values(model), before)


def test_resuming_on_another_base(llama: Any, tmp_path: Path) -> None:
    pissa = LoraLiteConfig(variant="pissa", r=2, task_type="CAUSAL_LM")
    trainer(get_peft_model(llama(), pissa), tmp_path, steps=2).train()
    with pytest.raises(ll.BaseMismatch, match="the checkpoint was made on another base model"):
        trainer(get_peft_model(llama(1), pissa), tmp_path).train(resume_from_checkpoint=True)


def test_resuming_several_adapters(llama: Any, tmp_path: Path) -> None:
    def make() -> PeftModel:
        model = get_peft_model(llama(), LoraLiteConfig(**HRA))
        model.add_adapter("gates", LoraLiteConfig(variant="ia3", task_type="CAUSAL_LM"))
        model.set_adapter("gates")
        return model

    whole, resumed = make(), make()
    trainer(whole, tmp_path / "a").train()
    trainer(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert resumed.active_adapters == ["gates"]
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_resuming_under_another_name(llama: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """The Trainer by itself would add "style", and train a "default" that starts anew with the old optimizer."""
    whole = get_peft_model(llama(), LoraLiteConfig(**HRA), adapter_name="style")
    trainer(whole, tmp_path / "a").train()
    model = get_peft_model(llama(), LoraLiteConfig(**HRA))
    with pytest.raises(ll.ModelStateError) as caught:
        trainer(model, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert "was trained with an adapter 'style', and this model trains 'default', which would start anew" in str(
        caught.value
    )
    assert list(model.peft_config) == list(ll.adapters(model.get_base_model())) == ["default"]
    model.set_requires_grad("default", False)
    model.load_adapter(tmp_path / "a/checkpoint-4/style", "style")
    model.set_adapter("style")
    assert torch.equal(model(ids).logits, whole.eval()(ids).logits)
    resumed = get_peft_model(llama(), LoraLiteConfig(**HRA), adapter_name="style")
    trainer(resumed, tmp_path / "c").train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert torch.equal(resumed.eval()(ids).logits, whole(ids).logits)


def test_a_schedule_goes_on(llama: Any, tmp_path: Path) -> None:
    """Of a method that acts before each step, followed as everywhere."""
    AdaLora = ll.get_variant("adalora").Config

    def run(folder: str, **more: Any) -> PeftModel:
        model = get_peft_model(llama(), LoraLiteConfig(AdaLora(r=4), task_type="CAUSAL_LM"))
        training = trainer(model, tmp_path / folder)
        ll.follow(model.get_base_model(), training.create_optimizer())
        training.train(**more)
        return model

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert ll.adapters(resumed.get_base_model())["default"].record.step == 4
    assert_equal(values(resumed), values(whole))


def test_the_best_model_is_there_at_the_end(llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraLiteConfig(**HRA, modules_to_save=["lm_head"]))
    run = trainer(model, tmp_path, steps=6, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    run.create_optimizer()
    run.optimizer.param_groups[0]["lr"] = 1.0
    run.train()
    best = PeftModel.from_pretrained(llama(), run.state.best_model_checkpoint)
    assert_equal(values(best), values(model))
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    run.save_model(str(tmp_path / "saved"))
    assert_equal(values(PeftModel.from_pretrained(llama(), tmp_path / "saved")), values(model))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_accepted(bits: int, llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised bases; type: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    llama().save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised, device_map="cpu")
    with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized models"):
        trainer(base, tmp_path)
    model = get_peft_model(base, LoraLiteConfig(**HRA))
    before = values(model)
    trainer(model, tmp_path, gradient_checkpointing=True).train()
    moved = values(model)
    assert all(not torch.equal(moved[key], before[key]) for key in moved)
    assert (tmp_path / "checkpoint-4/adapter_model.safetensors").exists()


def test_gradient_checkpointing_and_bfloat16(llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(llama().bfloat16(), LoraLiteConfig(variant="lora", r=2, task_type="CAUSAL_LM"))
    before = values(model)
    run = trainer(model, tmp_path, gradient_checkpointing=True, bf16=True)
    run.train()
    after = values(model)
    assert all(value.dtype == torch.float32 and not torch.equal(value, before[key]) for key, value in after.items())
