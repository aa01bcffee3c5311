"""What many adapters cost: the numbers of docs/many.md. `uv run python tools/measure_many.py` prints them."""

from __future__ import annotations

import gc
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

import lora_lite as ll

HIDDEN, ROWS, TOKENS, RANK = 1024, 32, 16, 8


def stack(layers: int, width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def moved(model: nn.Module, name: str, r: int = RANK) -> ll.Adapter:
    adapter = ll.attach(model, ll.LoRAConfig(r=r), name=name)
    for parameter in adapter.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    return adapter


def cpu(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def ratio(one: Callable[[], object], other: Callable[[], object], rounds: int = 15) -> float:
    """Median of the ratios of processor time, in turns."""
    one(), other()
    return statistics.median(cpu(one) / cpu(other) for _ in range(rounds))


@torch.no_grad()
def rows() -> None:
    model = stack(4, HIDDEN)
    names = [f"a{number}" for number in range(ROWS)]
    for name in names:
        moved(model, name)
    ll.activate(model)
    for tokens in (1, TOKENS, 8 * TOKENS):
        x = torch.randn(ROWS, tokens, HIDDEN)

        def steps(block: AbstractContextManager[None], x: torch.Tensor = x) -> None:
            with block:  # as around `generate`
                for _ in range(16):
                    model(x)

        many = ratio(lambda: steps(ll.routed(model, names)), lambda: steps(ll.active(model, "a0")))
        print(f"{ROWS} adapters on {ROWS} rows of {tokens} tokens, over one on all: {many:.2f}")


@torch.no_grad()
def pool(files: int = 1000, slots: int = 8) -> None:
    from torch._dynamo.testing import CompileCounter

    counter, model = CompileCounter(), stack(4, 128)
    x = torch.randn(slots, 4, 128)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.safetensors" for number in range(files)]
        first = moved(model, "slot0")
        for path in paths:
            for parameter in first.parameters():
                parameter.data.add_(0.001 * torch.randn_like(parameter))
            first.save(path)
        names = [f"slot{number}" for number in range(slots)]
        adapters = [first, *(moved(model, name) for name in names[1:])]
        compiled = torch.compile(model, backend=counter)
        with ll.routed(model, names):
            compiled(x)
        graphs, took, memory = counter.frame_count, [], []
        for at in range(0, files, slots):
            for adapter, path in zip(adapters, paths[at : at + slots], strict=False):
                took.append(cpu(lambda adapter=adapter, path=path: adapter.load_(path)))
            with ll.routed(model, names):
                compiled(x)
            gc.collect()
            memory.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(gc.get_objects())))
    half, last = memory[len(memory) // 2], memory[-1]
    print(
        f"{files} files through {slots} slots: {1e3 * statistics.median(took):.1f} ms a file, "
        f"{counter.frame_count - graphs} new graphs, {(last[0] - half[0]) / 1024:.1f} MB and {last[1] - half[1]} "
        "objects more in the second half"
    )


def grown(layers: int, adapters: int) -> tuple[list[float], list[float]]:
    """Microseconds a layer that each attach took, and then each switch to another adapter."""
    model = stack(layers, 16)
    attach = [cpu(lambda: moved(model, f"a{number}", r=1)) for number in range(adapters)]  # noqa: B023
    switch = [cpu(lambda: ll.activate(model, f"a{number}")) for number in range(adapters)]  # noqa: B023
    return [1e6 * one / layers for one in attach], [1e6 * one / layers for one in switch]


def sizes() -> None:
    for layers in (100, 1000):
        attach, switch = map(statistics.median, grown(layers, 20))
        print(f"20 adapters on {layers} layers: attach {attach:.0f} µs a layer, switch {switch:.1f} µs a layer")
    attach, switch = grown(100, 200)
    early, late = statistics.median(attach[:20]), statistics.median(attach[180:])
    print(f"200 adapters on 100 layers: attach {early:.0f} µs a layer for the first 20, {late:.0f} µs for the last 20")
    print(f"200 adapters on 100 layers: switch {statistics.median(switch):.1f} µs a layer")


def switches(times: int = 10_000) -> None:
    model = stack(2, 16)
    moved(model, "a"), moved(model, "b")

    def once() -> None:
        with ll.active(model, "b"), ll.strength(model, {"b": 0.5}), ll.routed(model, ["a", "b"]):
            pass

    for _ in range(100):
        once()
    gc.collect()
    before = len(gc.get_objects())
    took = cpu(lambda: [once() for _ in range(times)])
    gc.collect()
    print(
        f"{times} switches: {1e6 * took / times:.0f} µs each, {len(gc.get_objects()) - before} objects more after them"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows(), pool(), sizes(), switches()
