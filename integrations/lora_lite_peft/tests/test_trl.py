"""TRL's trainers with `peft_config=LoraLiteConfig(…)`, on a tiny model and tokenizer made here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lite_peft import LoraLiteConfig
from peft import PeftModel

import lora_lite as ll

HOW = "TRL is in the test group; type: uv run --package lora-lite-peft --group test pytest -m slow integrations/lora_lite_peft"
pytest.importorskip("trl", reason=HOW)
datasets = pytest.importorskip("datasets", reason=HOW)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # TRL's, datasets' and transformers' own
VARIANTS = ["lora", "hra", "pissa", "ia3"]
WORDS = [f"w{i}" for i in range(90)]
COMMON = {
    "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2,
    "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False, "dataloader_pin_memory": False,
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def words(seed: int, count: int = 5) -> str:
    picked = torch.randint(0, len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picked)


def pairs() -> Any:
    rows = [{"prompt": words(i), "chosen": words(i + 50), "rejected": words(i + 99)} for i in range(12)]
    return datasets.Dataset.from_list(rows)


def config_of(variant: str, **more: Any) -> LoraLiteConfig:
    ranked = {"r": 2} if "r" in ll.get_variant(variant).Config.__dataclass_fields__ else {}
    return LoraLiteConfig(variant=variant, **ranked, **{"task_type": "CAUSAL_LM", **more})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(model: Any, folder: Path, tokenizer: Any, **more: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    rows = datasets.Dataset.from_list([{"text": words(i, 8)} for i in range(12)])
    return SFTTrainer(
        model, SFTConfig(str(folder), max_length=16, **COMMON), train_dataset=rows, processing_class=tokenizer, **more
    )


@pytest.mark.parametrize("variant", [*VARIANTS, "shift"])
def test_sft(variant: str, llama: Any, ids: Any, tokenizer: Any, tmp_path: Path, shift: Any) -> None:
    trainer = sft(llama(), tmp_path, tokenizer, peft_config=config_of(variant))
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert not (tmp_path / "checkpoint-2/model.safetensors").exists()
    trained = trainer.model.eval()(ids).logits
    assert not torch.allclose(trained, llama()(ids).logits)
    again = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-2")
    torch.testing.assert_close(again(ids).logits, trained, rtol=0, atol=1e-6)


def dpo(model: Any, folder: Path, tokenizer: Any, **more: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(str(folder), max_length=24, **{**COMMON, **more.pop("arguments", {})})
    return DPOTrainer(model, args=arguments, train_dataset=pairs(), processing_class=tokenizer, **more)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dpo_with_the_base_as_reference(variant: str, llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    trainer = dpo(llama(), tmp_path, tokenizer, peft_config=config_of(variant))
    assert trainer.ref_model is None
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-4)
    assert losses(trainer)[1] != pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dpo_that_continues_sft(
    variant: str, precomputed: bool, llama: Any, ids: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """The reference is the adapter as SFT has left it, on the same base: TRL's adapter "ref", no second model."""
    before = sft(llama(), tmp_path / "sft", tokenizer, peft_config=config_of(variant))
    before.train()
    model = PeftModel.from_pretrained(llama(), tmp_path / "sft/checkpoint-2", is_trainable=True)
    start = model(ids).logits
    more = {"precompute_ref_log_probs": True} if precomputed else {}
    trainer = dpo(model, tmp_path / "dpo", tokenizer, arguments=more)
    assert trainer.ref_model is None
    assert list(model.peft_config) == ["default", "ref"]
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-4)
    assert model.active_adapters == ["default"]
    assert not torch.allclose(model.eval()(ids).logits, start)
    model.set_adapter("ref")
    assert torch.equal(model(ids).logits, start)
    saved = PeftModel.from_pretrained(llama(), tmp_path / "dpo/checkpoint-2")
    model.set_adapter("default")
    assert torch.equal(saved(ids).logits, model(ids).logits)


def test_dpo_right_after_sft_and_resumed(llama: Any, ids: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = sft(llama(), tmp_path / "sft", tokenizer, peft_config=config_of("hra"))
    model.train()
    trainer = dpo(model.model, tmp_path / "dpo", tokenizer, arguments={"max_steps": 4})
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-4)
    whole = trainer.model.eval()(ids).logits
    again = PeftModel.from_pretrained(llama(), tmp_path / "sft/checkpoint-2", is_trainable=True)
    resumed = dpo(again, tmp_path / "again", tokenizer, arguments={"max_steps": 4})
    resumed.train(resume_from_checkpoint=str(tmp_path / "dpo/checkpoint-2"))
    torch.testing.assert_close(again.eval()(ids).logits, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_grpo(variant: str, continued: bool, llama: Any, ids: Any, tokenizer: Any, tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    model, more = llama(), {"peft_config": config_of(variant)}
    if continued:
        before = sft(model, tmp_path / "sft", tokenizer, **more)
        before.train()
        model, more = PeftModel.from_pretrained(llama(), tmp_path / "sft/checkpoint-2", is_trainable=True), {}
    arguments = GRPOConfig(str(tmp_path), num_generations=4, max_completion_length=6, beta=0.1, **COMMON)
    prompts = datasets.Dataset.from_list([{"prompt": words(i)} for i in range(12)])
    trainer = GRPOTrainer(model, reward, arguments, train_dataset=prompts, processing_class=tokenizer, **more)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert kl[1] > 0
    again = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-2")
    torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reward(variant: str, llama: Any, ids: Any, tokenizer: Any, tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    def base() -> Any:
        return llama(kind="LlamaForSequenceClassification", num_labels=1)

    config = config_of(variant, task_type="SEQ_CLS")
    trainer = RewardTrainer(
        base(), RewardConfig(str(tmp_path), max_length=24, **COMMON), train_dataset=pairs(), processing_class=tokenizer,
        peft_config=config,
    )  # fmt: skip
    head = trainer.model.get_base_model().score.weight
    before = head.clone()
    trainer.train()
    assert not torch.equal(head, before)
    saved = PeftModel.from_pretrained(base(), tmp_path / "checkpoint-2")
    torch.testing.assert_close(saved(ids)[0], trainer.model.eval()(ids)[0], rtol=0, atol=1e-5)


def test_a_quantised_base(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised bases; type: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    llama().save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised, device_map="cpu")
    trainer = sft(base, tmp_path, tokenizer, peft_config=config_of("lora"))
    trainer.train()
    adapter = ll.adapters(trainer.model.get_base_model())["default"]
    assert {tensor.dtype for tensor in adapter.parameters()} == {torch.bfloat16}  # TRL's choice for quantised bases
    assert all(float(tensor.abs().sum()) > 0 for tensor in adapter.parameters())
