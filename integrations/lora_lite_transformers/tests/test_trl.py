"""TRL's trainers without PEFT: `class T(AdapterTrainer, SFTTrainer)`, on a tiny model and tokenizer made here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lite_transformers import AdapterTrainer, adapter_trainer

import lora_lite as ll

HOW = "TRL is in the test group; type: uv run --package lora-lite-transformers --group test pytest -m slow integrations/lora_lite_transformers"
trl = pytest.importorskip("trl", reason=HOW)
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


def adapted(model: Any, variant: str, **fields: Any) -> Any:
    ranked = {"r": 2} if "r" in ll.get_variant(variant).Config.__dataclass_fields__ else {}
    ll.attach(model, ll.LoraLiteConfig(variant=variant, **ranked, **fields))
    return model


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def kind_of(name: str) -> Any:
    kind = getattr(trl, name)
    return type(kind.__name__, (AdapterTrainer, kind), {})


def sft(model: Any, folder: Path, tokenizer: Any, kind: Any = None, **more: Any) -> Any:
    rows = datasets.Dataset.from_list([{"text": words(i, 8)} for i in range(12)])
    config = trl.SFTConfig(str(folder), max_length=16, **{**COMMON, **more})
    return (kind or kind_of("SFTTrainer"))(model, config, train_dataset=rows, processing_class=tokenizer)


def dpo(model: Any, folder: Path, tokenizer: Any, **more: Any) -> Any:
    config = trl.DPOConfig(str(folder), max_length=24, **{**COMMON, **more})
    return kind_of("DPOTrainer")(model, args=config, train_dataset=pairs(), processing_class=tokenizer)


def check_checkpoint(folder: Path, model: Any, base: Any, ids: Any) -> None:
    """It holds the adapter alone, and opens."""
    assert [path.name for path in folder.rglob("*.safetensors")] == ["default.safetensors"]
    ll.load(base, folder)
    torch.testing.assert_close(base(ids)[0], model.eval()(ids)[0], rtol=0, atol=1e-5)


def check_shared(view: Any, model: Any) -> None:
    """The view has no memory of its own but for a copy of the adapter."""
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    own = [name for name, parameter in view.named_parameters() if parameter.data_ptr() not in shared]
    assert own
    assert all("lora_" in name for name in own), own


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("instance", [False, True])
def test_sft(variant: str, instance: bool, llama: Any, ids: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(llama(), variant)
    trainer = sft(model, tmp_path, tokenizer, kind=trl.SFTTrainer if instance else None)
    if instance:
        adapter_trainer(trainer)
    trainer.train()
    assert not torch.allclose(model.eval()(ids).logits, llama()(ids).logits)
    check_checkpoint(tmp_path / "checkpoint-2", model, llama(), ids)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dpo(variant: str, llama: Any, ids: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(llama(), variant)
    trainer = dpo(model, tmp_path, tokenizer)
    check_shared(trainer.ref_model, model)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-4)
    assert losses(trainer)[1] != pytest.approx(math.log(2), abs=1e-5)
    check_checkpoint(tmp_path / "checkpoint-2", model, llama(), ids)


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dpo_that_continues_sft(
    variant: str, precomputed: bool, llama: Any, ids: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """The reference is the adapter as SFT has left it: on the same model object, which SFTTrainer has put a forward on."""
    model = adapted(llama(), variant)
    sft(model, tmp_path / "sft", tokenizer).train()
    start = model.eval()(ids).logits
    assert not torch.allclose(start, llama()(ids).logits)
    trainer = dpo(model, tmp_path / "dpo", tokenizer, precompute_ref_log_probs=precomputed)
    view = trainer.ref_model
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-4)
    assert torch.equal(view(ids).logits, start)
    assert not torch.allclose(model.eval()(ids).logits, start)


def test_dpo_against_the_base_and_against_a_second_model(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    """`ref_model=ll.reference_view(model)` gives the losses that a second model in memory gives, in TRL's own trainer."""
    seen = []
    for second in (False, True):
        model = adapted(llama(), "lora")
        sft(model, tmp_path / "sft", tokenizer).train()
        reference = llama().requires_grad_(False) if second else ll.reference_view(model)
        config = trl.DPOConfig(str(tmp_path), max_length=24, **COMMON)
        trainer = trl.DPOTrainer(model, reference, config, train_dataset=pairs(), processing_class=tokenizer)
        adapter_trainer(trainer).train()
        seen.append(losses(trainer))
    assert seen[0] == seen[1]
    assert seen[0][0] != pytest.approx(math.log(2), abs=1e-5)


def test_dpo_resumed(llama: Any, ids: Any, tokenizer: Any, tmp_path: Path) -> None:
    whole = adapted(llama(), "hra")
    sft(whole, tmp_path / "sft", tokenizer).train()
    dpo(whole, tmp_path / "dpo", tokenizer, max_steps=4).train()
    again = llama()
    ll.load(again, tmp_path / "sft/checkpoint-2")
    resumed = dpo(again, tmp_path / "again", tokenizer, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "dpo/checkpoint-2"))
    torch.testing.assert_close(again.eval()(ids).logits, whole.eval()(ids).logits, rtol=0, atol=1e-5)


def unlike(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_grpo(variant: str, name: str, continued: bool, llama: Any, ids: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(llama(), variant)
    if continued:
        sft(model, tmp_path / "sft", tokenizer).train()
    start = model.eval()(ids).logits
    kind, config = kind_of(name), getattr(trl, name.replace("Trainer", "Config"))
    arguments = config(str(tmp_path), num_generations=4, max_completion_length=6, beta=0.1, **COMMON)
    prompts = datasets.Dataset.from_list([{"prompt": words(i)} for i in range(12)])
    trainer = kind(model, unlike, arguments, train_dataset=prompts, processing_class=tokenizer)
    assert trainer.beta == arguments.beta == 0.1
    check_shared(trainer.ref_model, model)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert kl[1] != 0  # RLOO's estimate has a sign
    assert torch.equal(trainer.ref_model(ids).logits, start)
    check_checkpoint(tmp_path / "checkpoint-2", model, llama(), ids)


@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer", "GRPOTrainer"])
def test_an_adapter_on_the_head_is_refused(name: str, llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    """TRL multiplies by the head's weight itself: the adapter would not act, and its B would stay zero."""
    model = adapted(llama(), "lora", target_names=("q_proj", "lm_head"), exclude_names=())
    grpo = name == "GRPOTrainer"
    config = getattr(trl, name.replace("Trainer", "Config"))
    arguments = config(str(tmp_path), **COMMON, **({"num_generations": 4} if grpo else {}))
    more = {"reward_funcs": unlike} if grpo else {}
    with pytest.raises(
        ll.ModelStateError,
        match=r"reads lm_head.weight without calling .* adapter 'default' .*train_modules=\('lm_head',\)",
    ):
        kind_of(name)(model, args=arguments, train_dataset=pairs(), processing_class=tokenizer, **more)


def test_an_adapter_on_the_head_of_a_trainer_that_is_there(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(llama(), "lora", target_names=("lm_head",), exclude_names=())
    trainer = sft(model, tmp_path, tokenizer, kind=trl.SFTTrainer)
    with pytest.raises(ll.ModelStateError, match="reads lm_head.weight without calling"):
        adapter_trainer(trainer)
    assert type(trainer) is trl.SFTTrainer


def test_a_head_that_is_trained_whole(llama: Any, ids: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(llama(), "lora", train_modules=("lm_head",))
    before = model.lm_head.weight.clone()
    sft(model, tmp_path, tokenizer).train()
    assert not torch.equal(model.lm_head.weight, before)
    check_checkpoint(tmp_path / "checkpoint-2", model, llama(), ids)


def test_references_that_cannot_be(llama: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ll.ModelStateError, match="FSDP or DeepSpeed would shard them twice; train with DDP"):
            dpo(adapted(llama(), "lora"), tmp_path, tokenizer)
    with pytest.raises(ll.ModelStateError, match="sync_ref_model=True writes the trained weights into the reference"):
        dpo(adapted(llama(), "lora"), tmp_path, tokenizer, sync_ref_model=True)
    arguments = trl.GRPOConfig(str(tmp_path), beta=0.1, num_generations=4, **COMMON)
    with pytest.raises(Exception):  # noqa: B017, PT011 (TRL's own, for a data set that is none)
        kind_of("GRPOTrainer")(adapted(llama(), "lora"), unlike, arguments, train_dataset=3, processing_class=tokenizer)
    assert arguments.beta == 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_reward(variant: str, llama: Any, ids: Any, tokenizer: Any, tmp_path: Path) -> None:
    def base() -> Any:
        return llama(kind="LlamaForSequenceClassification", num_labels=1)

    model = adapted(base(), variant, train_modules=("score",))
    before = model.score.weight.clone()
    config = trl.RewardConfig(str(tmp_path), max_length=24, **COMMON)
    kind_of("RewardTrainer")(model, config, train_dataset=pairs(), processing_class=tokenizer).train()
    assert not torch.equal(model.score.weight, before)
    check_checkpoint(tmp_path / "checkpoint-2", model, base(), ids)


def test_a_quantised_base(llama: Any, ids: Any, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised bases; type: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    llama().save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised, device_map="cpu")
    model = adapted(base, "lora")
    sft(model, tmp_path / "sft", tokenizer).train()
    start = model.eval()(ids).logits
    trainer = dpo(model, tmp_path / "dpo", tokenizer)
    check_shared(trainer.ref_model, model)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-4)
    assert torch.equal(trainer.ref_model(ids).logits, start)
