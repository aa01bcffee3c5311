"""PeftModel for each task, heads that are trained whole, quantised bases."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from lora_lite_peft import LoraLiteConfig
from packaging.version import Version
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

import lora_lite as ll

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
T5 = {
    "vocab_size": 100,
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
TASKS = {
    "CAUSAL_LM": (transformers.LlamaConfig(**SMALL), transformers.LlamaForCausalLM, ()),
    "SEQ_CLS": (transformers.BertConfig(**SMALL, num_labels=3), transformers.BertForSequenceClassification, ("classifier",)),
    "SEQ_2_SEQ_LM": (transformers.T5Config(**T5), transformers.T5ForConditionalGeneration, ()),
    "TOKEN_CLS": (transformers.BertConfig(**SMALL), transformers.BertForTokenClassification, ("classifier",)),
    "QUESTION_ANS": (transformers.BertConfig(**SMALL), transformers.BertForQuestionAnswering, ("qa_outputs",)),
    "FEATURE_EXTRACTION": (transformers.BertConfig(**SMALL), transformers.BertModel, ()),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_a_task(task: str, ids: Any, tmp_path: Path) -> None:
    config, Model, heads = TASKS[task]
    prepared = hasattr(Model, "_prepare_encoder_decoder_kwargs_for_generation")
    if task == "SEQ_2_SEQ_LM" and Version(peft.__version__) < Version("0.21.2") and not prepared:
        pytest.skip(f"PEFT {peft.__version__} itself does not know encoder-decoders of this transformers")

    def make() -> Any:
        torch.manual_seed(0)
        return Model(copy.deepcopy(config)).eval()

    def outputs(model: Any) -> torch.Tensor:
        given = {"decoder_input_ids": ids} if task == "SEQ_2_SEQ_LM" else {}
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **given)[0]

    base = outputs(make().requires_grad_(False))
    model = get_peft_model(make(), LoraLiteConfig(variant="ia3", task_type=task))
    assert type(model).__name__.startswith("PeftModelFor")
    assert torch.equal(outputs(model), base)
    assert ll.adapters(model.get_base_model())["default"].record.whole.keys() == {
        f"{head}.{part}" for head in heads for part in ("weight", "bias")
    }
    assert {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == {
        f"{head}.{part}" for head in heads for part in ("weight", "bias")
    }  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    moved = outputs(model)
    assert not torch.allclose(moved, base)
    with model.disable_adapter():
        assert torch.equal(outputs(model), base)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(make(), tmp_path)), moved)
    if task == "SEQ_2_SEQ_LM":
        model.generate(input_ids=ids, max_new_tokens=3)
    torch.testing.assert_close(outputs(model.merge_and_unload()), moved, rtol=1e-4, atol=1e-5)


def test_modules_to_save(llama: Any, ids: Any, train: Any, tmp_path: Path) -> None:
    """Named as PEFT names them; they are the core's `train_modules`, and belong to their adapter."""
    base = llama()(ids).logits
    config = LoraLiteConfig(variant="lora", r=2, target_names=("q_proj",), modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(llama(), config)
    assert torch.equal(model(ids).logits, base)
    train(model, ids)
    trained = model(ids).logits
    model.add_adapter("plain", LoraLiteConfig(variant="lora", r=2, target_names=("q_proj",)))
    model.set_adapter("plain")
    assert torch.equal(model(ids).logits, base)
    assert not model.get_base_model().lm_head.weight.requires_grad
    model.save_pretrained(tmp_path)  # "default" is not active and its head not in its place
    other = copy.deepcopy(model)
    for one in (model, other):
        one.set_adapter("default")
        assert torch.equal(one(ids).logits, trained)
    assert model.get_base_model().lm_head.weight.requires_grad
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)
        model.save_pretrained(tmp_path / "off")
    for folder in (tmp_path, tmp_path / "off"):
        again = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
        assert torch.equal(again(ids).logits, trained)
    train(again, ids)
    again.add_adapter("plain", LoraLiteConfig(variant="lora", r=2))
    again.set_adapter("plain")
    again.load_adapter(tmp_path, "default")  # into one that is not active: the base's head stays
    assert torch.equal(again(ids).logits, base)
    again.set_adapter("default")
    assert torch.equal(again(ids).logits, trained)
    with pytest.raises(ll.TargetError, match="embed_tokens.weight is trained whole by adapter 'default' already"):
        model.add_adapter("third", LoraLiteConfig(variant="ia3", modules_to_save=["embed_tokens"]))
    with pytest.raises(
        ll.ModelStateError, match=r"TRL's reference is a copy of adapter 'default', whose modules_to_save"
    ):
        model.add_adapter("ref", model.peft_config["default"])
    assert list(model.peft_config) == list(ll.adapters(model.get_base_model())) == ["default", "plain"]
    model.set_adapter("plain")
    copied = pickle.loads(pickle.dumps(model))
    for one in (model, copied):
        assert torch.equal(one(ids).logits, base)
        one.set_adapter("default")
        assert torch.equal(one(ids).logits, trained)
    with pytest.raises(ll.TargetError) as caught:
        get_peft_model(llama(), LoraLiteConfig(variant="lora", modules_to_save=["lm_haed"]))
    assert str(caught.value) == "modules_to_save: no module is called 'lm_haed'; did you mean 'lm_head'?"


@pytest.fixture
def quantised(llama: Any, tmp_path: Path) -> Any:
    """A base that transformers has quantised with bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path / "dense")

    def load(bits: int) -> Any:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4"
        )
        return transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=config, device_map="cpu"
        )

    return load


@pytest.mark.filterwarnings("ignore::UserWarning")  # bitsandbytes' own, of casts
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("variant", ["lora", "pissa", "dora"])
def test_a_quantised_base(bits: int, variant: str, quantised: Any, ids: Any, train: Any, tmp_path: Path) -> None:
    base = prepare_model_for_kbit_training(quantised(bits), use_gradient_checkpointing=False)
    ll.prepare(base)
    before = base(ids).logits
    model = get_peft_model(base, LoraLiteConfig(variant=variant, r=2, task_type="CAUSAL_LM"))
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6)
    train(model, ids)
    trained = model(ids).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6)
    assert model.get_model_status().quantization_backend.startswith("bnb")
    model.print_trainable_parameters()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(prepare_model_for_kbit_training(quantised(bits)), tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, trained, rtol=0, atol=1e-5)
    with pytest.raises(ll.MergeError, match="to_dense=True"):
        model.merge_and_unload()
    assert torch.equal(model(ids).logits, trained)
    merged = model.merge_and_unload(to_dense=True)
    torch.testing.assert_close(merged(ids).logits, trained, rtol=0, atol=2e-2)
