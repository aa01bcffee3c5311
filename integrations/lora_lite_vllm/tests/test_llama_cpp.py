"""llama.cpp reads an export: by its own converter, and its own engine generates what the adapter does.

In an environment of its own: the engine of the wheel xllamacpp, the converters of the source archive of
llama-cpp-python, which has the whole of llama.cpp.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll

from .test_serving import run

pytestmark = pytest.mark.exhaustive
PACKAGES = ("xllamacpp", "gguf", "sentencepiece", "transformers", "safetensors", "protobuf", "torch")

TOKENIZER = """
import random, sys, sentencepiece as spm
random.seed(0)
words = ["ban", "dit", "kol", "mar", "sen", "tup", "vil", "gor", "hep", "zan"]
with open(sys.argv[1] + ".txt", "w") as f:
    for _ in range(2000):
        f.write(" ".join(random.choice(words) + random.choice(words) for _ in range(8)) + "\\n")
spm.SentencePieceTrainer.train(
    input=sys.argv[1] + ".txt", model_prefix=sys.argv[1], vocab_size=96, model_type="bpe", bos_id=1, eos_id=2, unk_id=0
)
"""

ENGINE = """
import json, sys, sentencepiece as spm, xllamacpp
base, adapter, tokenizer, prompt, tokens = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx = base, 256
if adapter:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    params.lora_adapters = [lora]
made = xllamacpp.Server(params).handle_completions(
    {"prompt": prompt, "n_predict": len(tokens), "temperature": 0.0, "top_k": 1, "ignore_eos": True}
)
expected = spm.SentencePieceProcessor(model_file=tokenizer).decode(tokens)
print("\\nFOUND " + json.dumps([made["choices"][0]["text"].strip(), expected.strip()]))
"""


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An interpreter with the engine, and the folder with the converters."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    run("uv", "venv", "-q", "--python", "3.11", folder / "venv")
    python = folder / "venv/bin/python"
    run("uv", "pip", "install", "-q", "--python", python, *PACKAGES)
    download = ("download", "-q", "--no-deps", "--no-binary", ":all:", "llama-cpp-python", "-d", folder)
    run("uv", "run", "-q", "--no-project", "--with", "pip", "python", "-m", "pip", *download)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return python, next(folder.glob("*/vendor/llama.cpp"))


@pytest.mark.parametrize("variant", ["lora", "pissa", "hra"])
def test_llama_cpp_generates_what_the_adapter_does(variant: str, llama_cpp: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    python, source = llama_cpp
    run(python, "-c", TOKENIZER, tmp_path / "tokenizer")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    shutil.copy(tmp_path / "tokenizer.model", tmp_path / "base")
    adapter = ll.attach(model, ll.LoraLiteConfig(variant=variant, r=4))
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    check = ll.export_lora(model, tmp_path / "lora", check=True).check
    assert check is not None
    assert check.tells

    run(
        python,
        source / "convert_hf_to_gguf.py",
        tmp_path / "base",
        "--outtype",
        "f32",
        "--outfile",
        tmp_path / "b.gguf",
    )
    lora = (tmp_path / "lora", "--base", tmp_path / "base", "--outtype", "f32", "--outfile", tmp_path / "l.gguf")
    run(python, source / "convert_lora_to_gguf.py", *lora)
    found: dict[str, str] = {}
    for name, tokens in {"l.gguf": check.tokens, "": check.base_tokens[: len(check.tokens)]}.items():
        given = [str(tmp_path / "b.gguf"), name and str(tmp_path / name), str(tmp_path / "tokenizer.model")]
        done = run(python, "-c", ENGINE, json.dumps([*given, check.prompt, tokens]))
        found[name], expected = json.loads(done.stdout.rpartition("FOUND ")[2].partition("\n")[0])
        if name:
            assert found[name] == expected
    assert found["l.gguf"] != found[""]
