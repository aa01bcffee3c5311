"""Two processes that meet, and what they do in tests/test_distributed.py."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lora_lite as ll

from .models import Net, token_ids
from .usual import SPREAD

FILE = "adapter.safetensors"
NAMES = SPREAD
OWN: dict[str, dict[str, Any]] = {
    "oft": {"block_size": 8},
    "ssvd": {"r": 4},
    "antipasto": {"r": 8},
    "trainable_tokens": {"rows": (1, 5), "target_names": ()},
}


def config(name: str, **more: Any) -> ll.AdapterConfig:
    rank = {"r": 4} if issubclass(ll.get_variant(name).Config, ll.RankConfig) else {}
    return ll.LoraLiteConfig(variant=name, **{**rank, **OWN.get(name, {}), **more})


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def attach(model: nn.Module, name: str, **more: Any) -> ll.Adapter:
    data = {"calibration_data": [{"ids": token_ids(seed, (8, 5))} for seed in range(3)]} if name == "eva" else {}
    return ll.attach(model, config(name, **more), **data)


def train(model: nn.Module, parameters: list[nn.Parameter], steps: int = 4, half: int | None = None) -> list[float]:
    """Losses of steps on batches of four rows, or on one half of each."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0), []
    for number in range(steps):
        ids = token_ids(number, (4, 5))
        ids = ids if half is None else ids[2 * half : 2 * half + 2]
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def shard(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in model.layers:
        fully_shard(block)
    return fully_shard(model)


def together(work: Callable[..., None], *given: Any) -> None:
    """work(rank, *given) in two new processes of one gloo group; raises if one of them does."""
    with tempfile.TemporaryDirectory() as folder:
        spawn = torch.multiprocessing.start_processes
        spawn(_member, (f"{folder}/meeting", work, given), nprocs=2, start_method="spawn")


def _member(rank: int, meeting: str, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    """Left by `os._exit`: as an interpreter ends, a thread of torch's own has been seen to abort the process."""
    torch.set_num_threads(1)
    # They meet in a file: a server in one of the processes could be gone before the other one has ended.
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        work(rank, *given)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def each_variant(rank: int, wrap: str, folder: str) -> None:
    """Every variant: attach, shard, train half of each batch, save; the outputs go into the folder."""
    found: dict[str, Tensor] = {}
    for name in NAMES:
        model = base()
        attach(model, name)
        outer: Any = {"ddp": _ddp, "fsdp1": _fsdp1, "fsdp2": shard}[wrap](model)
        train(outer, trained(outer), half=rank)
        with torch.no_grad():
            found[name] = outer(token_ids(9)).clone()
        if wrap == "fsdp2":
            ll.save(model, Path(folder) / f"{name}.safetensors")
    if rank == 0:
        torch.save(found, Path(folder) / "outputs.pt")


def _ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    warnings.simplefilter("ignore")
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def from_meta(rank: int, folder: str) -> None:
    """Every variant attached on meta, sharded, made, given the base's weights, then its own: new ones, or a file's."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    weights = base().state_dict()
    found: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for name in NAMES:
        for way in ("new", "file"):
            with torch.device("meta"):
                model = Net()
            adapter = ll.attach(model, config(name))
            shard(model)
            model.to_empty(device="cpu")
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(model, {k: v.clone() for k, v in weights.items()}, options=options)
            try:
                if way == "new":
                    adapter.initialize([{"ids": token_ids()}] if name == "eva" else None)
                else:
                    ll.load(model, Path(folder) / f"{name}.safetensors")
            except ll.ModelStateError as error:
                refused[f"{name} {way}"] = str(error)
                continue
            with torch.no_grad():
                found[f"{name} {way}"] = model(token_ids(9)).clone()
            train(model, trained(model), steps=1, half=rank)
    if rank == 0:
        torch.save((found, refused), Path(folder) / "meta.pt")


def heads(rank: int, folder: str) -> None:
    """A head that is trained whole, switched off and on in shards; what is refused there, with its text."""
    said: dict[str, str] = {}
    model = base()
    frozen = model(token_ids(9)).detach()
    attach(model, "lora", train_modules=("lm_head",))
    shard(model)
    train(model, trained(model), half=rank)
    on = model(token_ids(9)).detach()
    for _ in range(2):
        with ll.disabled(model):
            torch.testing.assert_close(model(token_ids(9)).detach(), frozen)
        torch.testing.assert_close(model(token_ids(9)).detach(), on)
    train(model, trained(model), steps=1, half=rank)
    on = model(token_ids(9)).detach()
    ll.save(model, Path(folder) / FILE)
    again = base()
    ll.load(again, Path(folder) / FILE)
    torch.testing.assert_close(again(token_ids(9)).detach(), on, rtol=1e-4, atol=1e-5)
    calls = {
        "merge": lambda: ll.merge(model),
        "export": lambda: ll.export_lora(model, Path(folder) / "lora"),
        "attach": lambda: attach(model, "ia3"),
        "detach": lambda: ll.detach(model),
        "load": lambda: ll.load(model, Path(folder) / FILE, name="second"),
        "nowhere": lambda: ll.save(model, Path(folder) / "none" / FILE),
    }
    for what, call in calls.items():
        try:
            call()
        except ll.LoraLiteError as error:
            said[what] = f"{type(error).__name__}: {error}"
    flat = base()
    attach(flat, "lora")
    _fsdp1(flat)
    try:
        ll.save(flat, Path(folder) / "flat.safetensors")
    except ll.ModelStateError as error:
        said["flat"] = str(error)
    torch.save(said, Path(folder) / f"said{rank}.pt")


class Vision(nn.Module):
    """ids → a picture of embeddings → a convolution → logits; blocks as the others have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        for block in self.layers:
            x = block(x)
        return self.head(x.transpose(1, 2))


class Logits(nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.layers = inner.model.layers

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).logits


def of_kind(kind: str) -> tuple[nn.Module, tuple[str, ...]]:
    torch.manual_seed(0)
    if kind in ("convolution", "embedding"):
        return Vision(), (r"layers\.\d\.0$",) if kind == "convolution" else ("embed",)
    from .experts import model

    return Logits(model("mixtral", kind, torch.float32)), (r"mlp\.experts\.",)


KINDS = ("convolution", "embedding", "eager", "grouped_mm")


def trained_kind(kind: str, name: str, half: int | None = None) -> tuple[nn.Module, list[float]]:
    model, targets = of_kind(kind)
    ll.attach(model, config(name, target_names=targets, exclude_names=()))
    if half is not None:
        shard(model)
    return model, train(model, trained(model), half=half)


def kinds(rank: int, folder: str) -> None:
    """Adapters on other kinds of layer, in shards."""
    for kind in KINDS:
        for name in ("lora", "dora"):
            model, _ = trained_kind(kind, name, rank)
            ll.save(model, Path(folder) / f"{kind} {name}.safetensors")


def swaps(rank: int, folder: str) -> None:
    """Another file's values into an adapter that DDP or FSDP2 holds, which goes on training; switching and strengths."""
    found: dict[str, Tensor] = {}
    for wrap, sharded in (("ddp", _ddp), ("fsdp2", shard)):
        for name in ("lora", "hra", "pissa"):
            model = base()
            attach(model, name)
            outer: Any = sharded(model)
            train(outer, trained(outer), steps=2, half=rank)
            ll.load_into(model, Path(folder) / f"{name}.safetensors")
            with torch.no_grad():
                found[f"{wrap} {name} swapped"] = outer(token_ids(9)).clone()
                with ll.strength(model, {"default": -0.5}):
                    found[f"{wrap} {name} strength"] = outer(token_ids(9)).clone()
                with ll.active(model):
                    found[f"{wrap} {name} off"] = outer(token_ids(9)).clone()
                with ll.routed(model, ["default", None, "default", None]):
                    found[f"{wrap} {name} routed"] = outer(token_ids(9, (4, 5))).clone()
            train(outer, trained(outer), steps=2, half=rank)
            with torch.no_grad():
                found[f"{wrap} {name} trained"] = outer(token_ids(9)).clone()
    if rank == 0:
        torch.save(found, Path(folder) / "swaps.pt")


def checkpointed(rank: int, folder: str) -> None:
    """torch.distributed.checkpoint: what is trained of a sharded model, written by all and read back by a fresh one,
    which goes on with its optimizer as the first does."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    found: dict[str, Tensor] = {}
    for name in ("lora", "hra", "dora"):
        made = []
        for again in (False, True):
            model = base()
            attach(model, name)
            shard(model)
            optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
            if not again:
                _steps(model, optimizer, range(2), rank)
            weights, state = get_state_dict(model, optimizer, options=options)
            where = f"{folder}/{name}"
            if again:
                dcp.load({"model": weights, "optimizer": state}, checkpoint_id=where)
                set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
            else:
                dcp.save({"model": weights, "optimizer": state}, checkpoint_id=where)
            made.append((model, optimizer))
        for which, (model, optimizer) in zip(("first", "again"), made, strict=True):
            _steps(model, optimizer, range(2, 4), rank)
            found[f"{name} {which}"] = model(token_ids(9)).detach()
        ll.save(model, Path(folder) / f"{name}.safetensors")
    if rank == 0:
        torch.save(found, Path(folder) / "checkpointed.pt")


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range, half: int) -> None:
    for number in numbers:
        ids = token_ids(number, (4, 5))[2 * half : 2 * half + 2]
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
