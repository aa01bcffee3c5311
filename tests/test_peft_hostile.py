"""Folders in PEFT's layout that are broken, hostile, or say what no variant can do: a typed error, at once."""

from __future__ import annotations

import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lite as ll
from lora_lite_core.files.peft.config_json.fields import IGNORED, KINDS, REFUSED, TRAINED

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEEP = "[" * 200_000


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "up_proj": nn.Linear(8, 12)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.embed = nn.Embedding(5, 8)


CONFIGS: dict[str, ll.AdapterConfig] = {
    "lora": ll.LoRAConfig(r=2, alpha=4, target_names=("_proj",), train_modules=("head",)),
    "dora": ll.DoRAConfig(r=2, target_names=("_proj",)),
    "ia3": ll.IA3Config(target_names=("_proj",)),
    "hra": ll.HRAConfig(r=2, target_names=("_proj",)),
    "oft": ll.OFTConfig(block_size=4, target_names=("_proj",)),
    "road": ll.RoAdConfig(group_size=4, target_names=("_proj",)),
    "delora": ll.DeLoRAConfig(r=2, frozen_copy=False, target_names=("_proj",)),
}


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each method, as PEFT's fields say it."""
    folders = {}
    for name, cfg in CONFIGS.items():
        folders[name] = tmp_path_factory.mktemp("peft") / name
        model = Net()
        ll.attach(model, cfg)
        ll.export_peft(model, folders[name])
    return folders


def imported(folder: Any, **options: Any) -> ll.LoraLiteError | None:
    """The error, if there is one; it is a typed one, comes at once, is short, and leaves the model as it was."""
    model, error = Net(), None
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = time.process_time()
    try:
        ll.import_peft(model, folder, **options)
    except ll.LoraLiteError as raised:
        error = raised
    assert time.process_time() - start < 8
    if error is not None:
        assert not ll.adapters(model)
        assert all(p.requires_grad for p in model.parameters())
        assert len(str(error)) < 1_500 + len(str(folder))
    else:
        ll.detach(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return error


def fields(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k not in names}), encoding="utf-8")

    return change


def text(content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def raw(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(content) and None


def header(value: Any, data: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
    encoded = value if isinstance(value, bytes) else json.dumps(value).encode()
    return raw(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        made = change(held)
        save_file(held if made is None else made, folder / WEIGHTS)

    return write


def put(key: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return tensors(lambda held: {**held, f"base_model.model.{key}": tensor})


def lost(*parts: str) -> Callable[[Path], None]:
    return tensors(lambda held: {key: t for key, t in held.items() if not any(part in key for part in parts)})


def replaced_by(part: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / part).unlink()
        make(folder / part)

    return change


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        head = json.dumps({"x": {"dtype": "U8", "shape": [10**11], "data_offsets": [0, 10**11]}}).encode()
        stream.write(struct.pack("<Q", len(head)) + head)
        stream.truncate(8 + len(head) + 10**11)


Q = "layers.0.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
BOMB = "(a+)+$"
F8 = torch.zeros(2, 8).to(torch.float8_e4m3fn)

# name: the method, what is done to its folder, the message
CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    # --- files that are no files, or not what they should be
    "no config": ("lora", lambda f: (f / CONFIG).unlink(), r"holds no adapter_config.json \(there: adapter_model.saf"),
    "no weights": ("lora", lambda f: (f / WEIGHTS).unlink(), r"holds no adapter_model.safetensors \(there: adapter_co"),
    "pickle": ("lora", lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin") and None, "a .bin is a pickle, which is not"),
    "config is a folder": ("lora", replaced_by(CONFIG, Path.mkdir), "adapter_config.json cannot be read: it is a directory"),
    "weights are a folder": ("lora", replaced_by(WEIGHTS, Path.mkdir), "adapter_model.safetensors cannot be read: it is a directory"),
    "config is a pipe": ("lora", replaced_by(CONFIG, os.mkfifo), "adapter_config.json cannot be read: it is a named pipe"),
    "weights are a pipe": ("lora", replaced_by(WEIGHTS, os.mkfifo), "adapter_model.safetensors cannot be read: it is a named pipe"),
    "config is a device": ("lora", replaced_by(CONFIG, lambda p: p.symlink_to("/dev/zero")), "cannot be read: it is a device"),
    "weights are a device": ("lora", replaced_by(WEIGHTS, lambda p: p.symlink_to("/dev/zero")), "cannot be read: it is a device"),
    "config is a circle": ("lora", replaced_by(CONFIG, lambda p: p.symlink_to(p)), "adapter_config.json cannot be read: Too"),
    "weights are a circle": ("lora", replaced_by(WEIGHTS, lambda p: p.symlink_to(p)), "cannot be read: Too many levels"),
    # --- JSON
    "empty config": ("lora", text(""), "adapter_config.json cannot be read: Expecting value"),
    "half a config": ("lora", text('{"r": 1'), "adapter_config.json cannot be read: "),
    "config not utf-8": ("lora", text(b'{"r": "\xff"}'), "adapter_config.json cannot be read: 'utf-8' codec"),
    "config with a BOM": ("lora", text(b'\xef\xbb\xbf{"peft_type": "LORA"}'), "adapter_config.json cannot be read: "),
    "deep config": ("lora", text('{"peft_type": "LORA", "r": ' + DEEP), "adapter_config.json cannot be read: values in values without end"),
    "deep dicts": ("lora", text('{"a":' * 100_000), "adapter_config.json cannot be read: "),
    "too deep": ("lora", fields(note=json.loads("[" * 400 + "]" * 400)), "cannot be read: values in values, more than 50 deep"),
    "deep but valid": ("lora", fields(note=json.loads("[" * 40 + "]" * 40)), r"note=\[\[\[\[\.\.\.\]\]\]\] in adapter_config.j"),
    "huge number": ("lora", text('{"peft_type": "LORA", "r": ' + "9" * 5_000 + "}"), "adapter_config.json cannot be read: a number of 5,000 digits"),
    "huge config": ("lora", text(b" " * 10_000_001), "adapter_config.json cannot be read: more than 10,000,000 bytes"),
    "config is a list": ("lora", text("[]"), "adapter_config.json names no peft_type"),
    "config is null": ("lora", text("null"), "adapter_config.json names no peft_type"),
    "config is a number": ("lora", text("1e999"), "adapter_config.json names no peft_type"),
    "config is empty": ("lora", text("{}"), "adapter_config.json names no peft_type"),
    # --- safetensors
    "empty weights": ("lora", raw(b""), "is not a safetensors file, or its beginning is damaged"),
    "short weights": ("lora", raw(b"short"), "is not a safetensors file, or its beginning is damaged"),
    "3 GB of header": ("lora", header({}, length=3_000_000_000), "is not a safetensors file, or its beginning is damaged"),
    "2**63 of header": ("lora", header({}, length=2**63), "is not a safetensors file, or its beginning is damaged"),
    "no header": ("lora", header(b"", length=0), "is not a safetensors file, or its beginning is damaged"),
    "header is no JSON": ("lora", header(b"{broken"), "adapter_model.safetensors is not a safetensors file, or its beginning is damaged"),
    "header is a list": ("lora", header([]), "adapter_model.safetensors is not a safetensors file, or its beginning is damaged"),
    "deep header": ("lora", header(b'{"a":' + b"[" * 100_000), "adapter_model.safetensors is not a safetensors file, or its beginning is damaged"),
    "metadata is a list": ("lora", header({"__metadata__": []}), "adapter_model.safetensors is not a safetensors file, or its beginning is damaged"),
    "no tensors": ("lora", header({}), "modules_to_save: adapter_model.safetensors lacks head.weight, head.bias"),
    "cut short": ("lora", lambda f: raw((f / WEIGHTS).read_bytes()[:-8])(f), "adapter_model.safetensors is cut short or damaged: 1,7.. bytes where its header speaks of 1,732"),
    "too long": ("lora", lambda f: raw((f / WEIGHTS).read_bytes() + b"12345678")(f), "adapter_model.safetensors is cut short or damaged: 1,7.. bytes where its header speaks of 1,732"),
    "100 GB": ("lora", replaced_by(WEIGHTS, sparse), "adapter_model.safetensors holds 100,000,000,000 bytes, and no adapter of this Net has more than 8,0"),
    "shape of floats": ("lora", header({"x": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}, b"1234"), "adapter_model.safetensors is not a safetensors file, or its beginning is damaged"),
    "negative shape": ("lora", header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "adapter_model.safetensors is not a safetensors file, or its beginning is damaged"),
    "overflowing shape": ("lora", header({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"), "adapter_model.safetensors is not a safetensors file, or its beginning is damaged"),
    "unknown dtype": ("lora", header({"x": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "adapter_model.safetensors is not a safetensors file, or its beginning is damaged"),
    "offsets backwards": ("lora", header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234"), "adapter_model.safetensors is not a safetensors file, or its beginning is damaged"),
    # --- tensors
    "deep key": ("lora", put("a." * 500_000 + "x", torch.zeros(1)), r"a\.a\.a\..* belongs to no layer of this Net that can be adapted"),
    "long key": ("lora", put("x" * 1_000_000, torch.zeros(1)), "xxx.* belongs to no layer of this Net that can be adapted"),
    "key of escapes": ("lora", put("\x1b[31mred", torch.zeros(1)), r"\\x1b\[31mred belongs to no layer of this Net"),
    "empty key": ("lora", put("", torch.zeros(1)), "belongs to no layer of this Net that can be adapted"),
    "key of dots": ("lora", put("...", torch.zeros(1)), "belongs to no layer of this Net that can be adapted"),
    "only a layer's name": ("lora", put(Q, torch.zeros(1)), "q_proj belongs to no layer of this Net that can be adapted"),
    "of an embedding": ("lora", put("embed.lora_embedding_A", torch.zeros(2, 5)), "there are tensors of embed, which the config does not sel"),
    "of a list": ("lora", put("layers.lora_A.weight", torch.zeros(2, 8)), "layers.lora_A.weight belongs to no layer of this Net"),
    "of a norm": ("lora", put("norm.weight", torch.zeros(8)), "there are tensors of norm, which the config does not select"),
    "of another block": ("lora", put("layers.7.q_proj.lora_A.weight", torch.zeros(2, 8)), "belongs to no layer of this Net"),
    "twice": ("lora", tensors(lambda t: {**t, A: torch.zeros(2, 8)}), "holds layers.0.q_proj.lora_A.weight twice, with and"),
    "bias beside": ("lora", put(f"{Q}.lora_B.bias", torch.zeros(8)), "q_proj: lora_B.bias is nothing that variant 'lora' r"),
    "base's bias": ("lora", put(f"{Q}.base_layer.bias", torch.zeros(8)), "q_proj: bias is nothing that variant"),
    "magnitude beside": ("lora", put(f"{Q}.lora_magnitude_vector", torch.ones(8)), "lora_magnitude_vector is nothing that"),
    "A lost": ("lora", lost(A), r"q_proj: 'lora_A.weight' is missing, in adapter_config.json or among its tensors lora_B.we"),
    "wrong way round": ("lora", put(A, torch.zeros(8, 2)), r"its tensors are {'lora_A': \(8, 2\)"),
    "a number": ("lora", put(A, torch.tensor(1.0)), r"its tensors are {'lora_A': \(\)"),
    "nothing in it": ("lora", put(A, torch.zeros(0, 8)), r"its tensors are {'lora_A': \(0, 8\)"),
    "three dimensions": ("lora", put(A, torch.zeros(2, 8, 1)), r"its tensors are {'lora_A': \(2, 8, 1\)"),
    "integers": ("lora", put(A, torch.zeros(2, 8, dtype=torch.int64)), r"lora_A.weight is torch.int64; an adapter's tensors"),
    "booleans": ("lora", put(A, torch.zeros(2, 8, dtype=torch.bool)), r"lora_A.weight is torch.bool; an adapter's tensors are"),
    "bytes": ("lora", put(A, torch.zeros(2, 8, dtype=torch.uint8)), r"lora_A.weight is torch.uint8; an adapter's tensors"),
    "eight bits": ("lora", put(A, F8), "lora_A.weight is torch.float8_e4m3fn; an adapter's tensors are float64, float32, bf"),
    "complex": ("lora", put(A, torch.zeros(2, 8, dtype=torch.complex64)), "lora_A.weight is torch.complex64; an adapter's"),
    # --- modules: what the config selects and what the file holds
    "a layer lost": ("lora", lost(Q), "selects 4 modules of this Net, and there is no tensor of layers.0.q_proj; the folder is not c"),
    "a kind of layers lost": ("lora", lost("up_proj"), "there is no tensor of layers.0.up_proj, layers.1.up_proj;"),
    "a layer not selected": ("lora", fields(target_modules=["q_proj"]), "there are tensors of layers.0.up_proj, layers.1.up_proj, which the config does not select"),
    "a layer excluded": ("lora", fields(exclude_modules=["0.q_proj"]), "there are tensors of layers.0.q_proj, which the config does not select"),
    "a block not selected": ("lora", fields(layers_to_transform=[1]), "there are tensors of layers.0.q_proj, layers.0.up_proj, layers.1.q"),
    "no layer selected": ("lora", fields(target_modules=[]), "there are tensors of layers.0.q_proj, layers.0.up_proj, layers.1.q"),
    "a class of layers": ("lora", fields(target_modules="all-linear", modules_to_save=[]), "head: 'lora_A.weight' is missing, in adapter_config.json or among its tensors bias, weight"),
    "no targets": ("lora", without("target_modules"), "target_modules is missing: give the names of the adapted modules"),
    "null targets": ("lora", fields(target_modules=None), "target_modules is missing: give the names of the adapted modules"),
    "a target of ours that is no layer": ("lora", fields(target_modules=["q_proj", "up_proj", "norm"]), "selects 5 modules of this Net, and there is no tensor of norm; "),
    "a million targets": ("lora", fields(target_modules=[f"x{i}" for i in range(500_000)]), "there are tensors of layers.0.q_proj, layers.0.up_proj, layers.1.q"),
    "a million exceptions": ("lora", fields(exclude_modules=["proj"] * 500_000 + ["0.q_proj"]), "there are tensors of layers.0.q_proj, which the"),
    "a million whole modules": ("lora", fields(modules_to_save=[f"x{i}." for i in range(500_000)]), "takes too many steps|belongs"),
    "a million ranks": ("lora", fields(rank_pattern={f"x{i}": 2 for i in range(500_000)}), "rank_pattern: the pattern 'x.* takes too many"),
    # --- whole modules
    "head lost": ("lora", lost("head"), "modules_to_save: adapter_model.safetensors lacks head.weight, head.bias"),
    "half of the head lost": ("lora", lost("head.bias"), "modules_to_save: adapter_model.safetensors lacks head.bias"),
    "more head": ("lora", put("head.scale", torch.ones(1)), "modules_to_save: head.scale is in adapter_model.safetensors and not"),
    "wider head": ("lora", put("head.weight", torch.zeros(5, 8)), r"modules_to_save: head.weight is \(5, 8\) of torch.float32 in"),
    "whole numbers in the head": ("lora", put("head.bias", torch.zeros(3, dtype=torch.int32)), r"head.bias is \(3,\) of torch.int32"),
    "head not named": ("lora", fields(modules_to_save=None), "there are tensors of head, which the config does not select"),
    "head is a text": ("lora", fields(modules_to_save="head"), "modules_to_save='head' in adapter_config.json: it is a list of"),
    "all is saved whole": ("lora", fields(modules_to_save=[""]), "modules_to_save: adapter_model.safetensors lacks"),
    "head adapted and whole": ("lora", put("head.lora_A.weight", torch.zeros(2, 8)), "head.lora_A.weight is in adapter_model.saf"),
    "pattern in the head": ("lora", fields(modules_to_save=["head", "(a+)+$"]), None or ""),
    # --- patterns
    "bomb in target_modules": ("lora", fields(target_modules="(.*)*(.*)*(.*)*!"), "there are tensors of layers.0.q_proj, layers.0.up_proj, layers.1.q"),
    "bomb in exclude_modules": ("lora", fields(exclude_modules="((a|b|.)*)*!"), ""),
    "bomb in rank_pattern": ("lora", fields(rank_pattern={"([a-z_.0-9]+)*!": 2}), ""),
    "bomb in alpha_pattern": ("lora", fields(alpha_pattern={"([a-z_.0-9]+)*!": 2}), ""),
    "brackets": ("lora", fields(rank_pattern={"(" * 5_000: 2}), "rank_pattern: the pattern '.* has more than 50 brackets"),
    "brackets in targets": ("lora", fields(target_modules="(" * 5_000), "target_modules: the pattern '.* has more than 50 br"),
    "half a bracket": ("lora", fields(rank_pattern={"(a": 2}), r"rank_pattern: the pattern '\(a' closes a bracket|opens a"),
    "star": ("lora", fields(target_modules="*_proj"), r"target_modules: the pattern '\*_proj' repeats nothing; write"),
    "look-ahead": ("lora", fields(target_modules="(?!x).*_proj"), "has look-around, a backreference, a flag or another"),
    "backreference": ("lora", fields(alpha_pattern={r"(.)\1": 2}), "alpha_pattern: the pattern .* has a set or an escape"),
    "billion of states": ("lora", fields(exclude_modules="((a{999}){999}){999}"), "needs more than 20,000 states"),
    "long pattern": ("lora", fields(target_modules="a" * 1_000_000), "has more than 20,000 characters"),
    "pattern of blocks": ("lora", fields(layers_to_transform=[0, 1], layers_pattern="(a+)+"), "layers_pattern='.* in adapter_config"),
    # --- fields
    "no rank": ("lora", without("r"), "'r' is missing, in adapter_config.json or among its tensors"),
    "no alpha": ("lora", without("lora_alpha"), "'lora_alpha' is missing, in adapter_config.json or among its"),
    "null alpha": ("lora", fields(lora_alpha=None), "lora_alpha=None in adapter_config.json: it is a number"),
    "alpha is a list": ("lora", fields(lora_alpha=[1]), r"lora_alpha=\[1\] in adapter_config.json: it is a number"),
    "alpha is true": ("lora", fields(lora_alpha=True), "lora_alpha=True in adapter_config.json: it is a number"),
    "alpha is infinite": ("lora", fields(lora_alpha=float("inf")), "lora_alpha=inf in adapter_config.json: it is a number"),
    "alpha is NaN": ("lora", fields(lora_alpha=float("nan")), "lora_alpha=nan in adapter_config.json: it is a number"),
    "alpha is huge": ("lora", fields(lora_alpha=10**39), "lora_alpha=1000.* in adapter_config.json: it is a number"),
    "alpha is zero": ("lora", fields(lora_alpha=0), "alpha is a number above 0"),
    "alpha is negative": ("lora", fields(lora_alpha=-1), "alpha is a number above 0"),
    "rank zero": ("lora", fields(r=0), "a rank is a whole number of at least 1"),
    "rank of a thousand": ("lora", fields(r=1_000), "for lora, which needs"),
    "rank is a text": ("lora", fields(r="2"), "r='2' in adapter_config.json: it is a whole number from 0"),
    "modules_to_save is a number": ("lora", fields(modules_to_save=3), "modules_to_save=3 in adapter_config.json: it is a list of"),
    "modules_to_save of numbers": ("lora", fields(modules_to_save=[3]), r"modules_to_save=\[3\] in adapter_config.json: it is"),
    "targets is a number": ("lora", fields(target_modules=3), "target_modules=3 in adapter_config.json: it is a list of na"),
    "targets of lists": ("lora", fields(target_modules=[["q_proj"]]), "target_modules=.* it is a list of names or a pattern"),
    "targets is a dict": ("lora", fields(target_modules={"q_proj": 1}), "target_modules=.* it is a list of names or a pattern"),
    "rank_pattern is a list": ("lora", fields(rank_pattern=["q_proj"]), "rank_pattern=.* it is numbers by pattern"),
    "rank_pattern of texts": ("lora", fields(rank_pattern={"q_proj": "2"}), "rank_pattern=.* it is numbers by pattern"),
    "rank_pattern of halves": ("lora", fields(rank_pattern={"q_proj": 1.5}), "a rank is a whole number of at least 1"),
    "rank_pattern of masks": ("lora", fields(rank_pattern={"q_proj": [True]}), "rank_pattern=.* it is numbers by pattern"),
    "adalora: rank_pattern of ranks": ("lora", fields(peft_type="ADALORA", rank_pattern={"q_proj": 2}), "rank_pattern=.* it is a list of true and false"),
    "adalora: rank_pattern of 0 and 1": ("lora", fields(peft_type="ADALORA", rank_pattern={"q_proj": [1, 0]}), "rank_pattern=.* it is a list of true and"),
    "kasa_config of texts": ("lora", fields(kasa_config={"beta": "0"}), "kasa_config=.* it is numbers by name"),
    "rank_pattern of another": ("lora", fields(rank_pattern={"0.q_proj": 1}), r"layers.0.q_proj: its tensors are {'lora_A': \(2, 8\)"),
    "flag is a text": ("lora", fields(use_rslora="no"), "use_rslora='no' in adapter_config.json: it is true or false"),
    "flag is a number": ("lora", fields(use_dora=1), "use_dora=1 in adapter_config.json: it is true or false"),
    "peft_type is null": ("lora", fields(peft_type=None), "peft_type=None in adapter_config.json: it is a text"),
    "peft_type is a list": ("lora", fields(peft_type=["LORA"]), r"peft_type=\['LORA'\] in adapter_config.json: it is a text"),
    "peft_type is unknown": ("lora", fields(peft_type="XLORA"), "no installed variant reads peft_type 'XLORA' with lora_A.wei"),
    "peft_type is long": ("lora", fields(peft_type="x" * 1_000_000), "no installed variant reads peft_type 'xxx"),
    "peft_type of another": ("lora", fields(peft_type="HRA"), "'hra_u' is missing, in adapter_config.json or among its tens"),
    "dropout of 1": ("lora", fields(lora_dropout=1), r"LoRAConfig\(dropout=1\): dropout is a number from 0 to below 1"),
    "dropout is a text": ("lora", fields(lora_dropout="0.1"), "lora_dropout='0.1' in adapter_config.json: it is a number fr"),
    "dropout of 2": ("lora", fields(lora_dropout=2), "lora_dropout=2 in adapter_config.json: it is a number from 0 to 1"),
    "bias": ("lora", fields(bias="lora_only"), "bias='lora_only' in adapter_config.json: adapter_model.safetensors lacks layers.0.q_proj.bias"),
    "lora_bias": ("lora", fields(lora_bias=True), "'lora_B.bias' is missing"),
    "lora_bias beside": ("lora", put(f"{Q}.lora_B.bias", torch.zeros(8)), "lora_B.bias is nothing that variant 'lora' reads"),
    "blocks: to be trained": ("lora", fields(use_bdlora={"nblocks": 2}), "use_bdlora={'nblocks': 2} in adapter_config.json keeps what is outside of the blo.*trainable=False"),
    "qalora: of single inputs": ("lora", fields(use_qalora=True, qalora_group_size=4), None or ""),
    "qalora: no group": ("lora", fields(use_qalora=True, qalora_group_size=0), None or ""),
    "alora: no ids": ("lora", fields(alora_invocation_tokens=["a"]), r"alora_invocation_tokens=\['a'\] in adapter_config.json: it is a list of token ids"),
    "alora and qalora": ("lora", fields(alora_invocation_tokens=[1], use_qalora=True), "use_qalora=True in adapter_config.json is not what variant 'alora' reads"),
    "changed base": ("lora", fields(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4' in adapter_config.json: PEFT draws"),
    "start is a number": ("lora", fields(init_lora_weights=3), "init_lora_weights=3 in adapter_config.json: it is true, false"),
    "mica": ("lora", fields(init_lora_weights="mica"), "init_lora_weights='mica' in adapter_config.json keeps lora_B"),
    "unknown field": ("lora", fields(lora_gamma=2), "lora_gamma=2 in adapter_config.json is not what variant 'lora' reads; it may cha"),
    "unknown field of escapes": ("lora", fields(**{"\x1b[2J": "\x1b[31m"}), r"\\x1b\[2J='\\x1b\[31m' in adapter_config.json is not"),
    "long unknown field": ("lora", fields(**{"x" * 100_000: "y" * 100_000}), "xxx.* in adapter_config.json is not what variant"),
    # --- other methods
    "dora: magnitude lost": ("dora", lost("magnitude"), "'lora_magnitude_vector' is missing"),
    "dora: one magnitude": ("dora", put(f"{Q}.lora_magnitude_vector", torch.ones(1)), r"lora_magnitude_vector has the shape \(1,\), not \(8,\)"),
    "dora: null alpha": ("dora", fields(lora_alpha=None), "lora_alpha=None in adapter_config.json: it is a number"),
    "dora: bias": ("dora", fields(bias="all"), "bias='all' in adapter_config.json: adapter_model.safetensors lacks "),
    "dora: bias beside": ("dora", put(f"{Q}.lora_B.bias", torch.zeros(8)), "lora_B.bias is nothing that variant 'dora' reads"),
    "ia3: wrong side": ("ia3", put(f"{Q}.ia3_l", torch.ones(1, 8)), r"ia3_l has the shape \(1, 8\); feedforward_modules says False"),
    "ia3: said otherwise": ("ia3", fields(feedforward_modules=["q_proj"]), r"ia3_l has the shape \(8, 1\); feedforward_modules says Tr"),
    "ia3: flat": ("ia3", put(f"{Q}.ia3_l", torch.ones(8)), r"ia3_l has the shape \(8,\)"),
    "ia3: bomb": ("ia3", fields(feedforward_modules="([a-z_.0-9]+)*!"), ""),
    "ia3: brackets": ("ia3", fields(feedforward_modules="(" * 5_000), "feedforward_modules: the pattern '.* has more than 50"),
    "ia3: feedforward is a number": ("ia3", fields(feedforward_modules=3), "feedforward_modules=3 in adapter_config.json: it is a l"),
    "hra: flat": ("hra", put(f"{Q}.hra_u", torch.ones(8)), "variant 'hra' cannot read its fields and tensors hra_u: RuntimeError"),
    "hra: odd rank": ("hra", fields(r=3), "reflections start in pairs, so r must be even"),
    "hra: other rank": ("hra", fields(r=4), "for hra, which needs"),
    "hra: orthogonal": ("hra", fields(apply_GS=True), "apply_GS=True is not what this variant computes"),
    "hra: bias": ("hra", fields(bias="hra_only"), "bias='hra_only' in adapter_config.json: adapter_model.safetensors lacks layers.0.q_proj.bias"),
    "oft: flat": ("oft", put(f"{Q}.oft_R.weight", torch.ones(8)), "variant 'oft' cannot read its fields and tensors oft_R.weight: Val"),
    "oft: other blocks": ("oft", fields(oft_block_size=2), "oft_R.weight holds 2 blocks of 4, but r=0 and oft_block_size=2"),
    "oft: other count": ("oft", fields(r=4, oft_block_size=0), "oft_R.weight holds 2 blocks of 4, but r=4 and oft_block_size=0"),
    "oft: constrained to nothing": ("oft", fields(coft=True, eps=0), "the bound on Q is a number above 0"),
    "oft: shared": ("oft", fields(block_share=True), r"its tensors are {'lora_q': \(2, 6\)} for oft, which needs"),
    "oft: series": ("oft", fields(use_cayley_neumann=True), "use_cayley_neumann=True with peft_version=None: PEFT's series"),
    "oft: no word of the series": ("oft", without("use_cayley_neumann"), "use_cayley_neumann=True with peft_version=None"),
    "oft: one term": ("oft", fields(use_cayley_neumann=True, peft_version="0.21.2", num_cayley_neumann_terms=1), "a series that turns has at least 2 terms"),
    "oft: dropout": ("oft", fields(module_dropout=0.5), "module_dropout=0.5 in adapter_config.json: variant 'oft' has no dropout"),
    "road: unknown": ("road", fields(variant="road_3"), "variant='road_3': RoAd has road_1, road_2, road_4"),
    "road: number": ("road", fields(variant=1), "variant=1 in adapter_config.json: it is a text"),
    "road: odd groups": ("road", fields(group_size=3), "a group is an even number of them"),
    "road: no groups": ("road", fields(group_size=0), "a group is an even number of them"),
    "road: other groups": ("road", fields(group_size=6), "does not divide d_out=8"),
    "road: other variant": ("road", fields(variant="road_4"), "for road, which needs"),
    "delora: other base": ("delora", put(f"{Q}.delora_w_norm", torch.ones(8)), "delora_w_norm does not hold the norms of this layer's co"),
    "delora: NaN base": ("delora", put(f"{Q}.delora_w_norm", torch.full((8,), float("nan"))), "delora_w_norm does not hold the norms"),
    "delora: narrow": ("delora", put(f"{Q}.delora_w_norm", torch.ones(4)), "delora_w_norm does not hold the norms of this layer's"),
    "delora: no strength": ("delora", fields(delora_lambda=0), "the strength is a number above 0"),
    "delora: text": ("delora", fields(delora_lambda="15"), "delora_lambda='15' in adapter_config.json: it is a number"),
    "delora: dropout": ("delora", fields(module_dropout=0.5), "module_dropout=0.5 in adapter_config.json: variant 'delora' has no dropout"),
    "delora: bias": ("delora", fields(bias="delora_only"), "bias='delora_only' in adapter_config.json: adapter_model.safetensors lacks layers.0.q_proj.bias"),
}  # fmt: skip
CASES |= {
    f"{name} is set": (
        "lora",
        fields(**{name: [1]}),
        rf"{name}=\[1\] in adapter_config.json .*; no variant here computes that",
    )
    for name in REFUSED
}
HARMLESS = (
    "pattern in the head",
    "bomb in exclude_modules",
    "bomb in rank_pattern",
    "bomb in alpha_pattern",
    "ia3: bomb",
    "qalora: of single inputs",  # a LoRA, for PEFT, too
    "qalora: no group",
)


@pytest.mark.parametrize("case", CASES)
def test_hostile_folders(case: str, good: dict[str, Path], tmp_path: Path) -> None:
    method, change, message = CASES[case]
    folder = tmp_path / "f"
    folder.mkdir()
    for part in (CONFIG, WEIGHTS):
        (folder / part).write_bytes((good[method] / part).read_bytes())
    change(folder)
    error = imported(folder)
    if case in HARMLESS:  # a pattern that selects nothing, a field that nothing uses
        assert error is None
        return
    assert isinstance(error, ll.AdapterFileError), error
    assert str(error).startswith(str(folder))
    assert re.search(message, str(error)), error


def test_there_are_many() -> None:
    assert len(CASES) > 150


ODD = [
    None, True, False, -1, 0, 1, 2.5, float("inf"), float("nan"), 10**39, "", "none", "x", "(", [], [None], ["q_proj", 3],
    [[["x"]]], {}, {"x": None}, {"q_proj": 1}, {"(": 2}, {"a": {"b": [1]}}, ["proj"] * 3, "\x00", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize(
    "values", [ODD[::6], pytest.param([one for n, one in enumerate(ODD) if n % 6], marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "name", [*KINDS, *IGNORED, *REFUSED, *TRAINED, "lora_dropout", "module_dropout", "unknown", ""]
)
def test_any_value_in_any_field(name: str, values: list[Any], good: dict[str, Path], tmp_path: Path) -> None:
    """An adapter or a typed error; a field that says nothing of the adapter may hold anything."""
    configs = {method: json.loads((good[method] / CONFIG).read_text(encoding="utf-8")) for method in CONFIGS}
    methods = [method for method, config in configs.items() if name in config and name not in configs["lora"]]
    for method in methods or ["lora"]:
        config = configs[method]
        (tmp_path / WEIGHTS).write_bytes((good[method] / WEIGHTS).read_bytes())
        for value in values:
            (tmp_path / CONFIG).write_text(json.dumps({**config, name: value}), encoding="utf-8")
            error = imported(tmp_path, trainable=bool(value))
            assert error is None or name not in IGNORED, (method, value, error)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(size, dtype=dtype) for size in ((), (0,), (1,), (8,), (2, 8), (1, 1, 1, 1), (2**20,))
     for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.complex64)],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)  # fmt: skip
def test_any_tensor_in_any_place(tensor: torch.Tensor, good: dict[str, Path], tmp_path: Path) -> None:
    for method in CONFIGS:
        held = load_file(good[method] / WEIGHTS)
        (tmp_path / CONFIG).write_bytes((good[method] / CONFIG).read_bytes())
        for key in [key for key in held if Q in key or "head" in key]:
            save_file({**held, key: tensor}, tmp_path / WEIGHTS)
            error = imported(tmp_path)
            fits = held[key].shape == tensor.shape and tensor.dtype.is_floating_point
            # The one number of DeLoRA's strength may be an array without dimensions.
            assert (error is None) is fits or key.endswith(("delora_lambda", "delora_w_norm")), (key, error)


@pytest.mark.parametrize("path", ["a\0b", "a" * 5_000, "a/" * 3_000, "nothing", "", None, 3, b"x", ["x"]], ids=repr)
def test_paths_that_are_none(path: Any, tmp_path: Path) -> None:
    assert isinstance(imported(str(tmp_path / path) if isinstance(path, str) else path), ll.AdapterFileError)


def test_a_folder_that_is_replaced_while_it_is_read(
    good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One adapter's config is never taken with another's weights."""
    from lora_lite_core.files.peft import folder_reading as reading

    for part in (CONFIG, WEIGHTS):
        (tmp_path / part).write_bytes((good["lora"] / part).read_bytes())
    real = reading._check_size

    def replaced(*args: Any) -> None:
        (tmp_path / "other").write_bytes((tmp_path / CONFIG).read_bytes())
        (tmp_path / "other").replace(tmp_path / CONFIG)
        real(*args)

    monkeypatch.setattr(reading, "_check_size", replaced)
    error = imported(tmp_path)
    assert "adapter_config.json was replaced while the folder was read; try again" in str(error)


@pytest.mark.parametrize("method", CONFIGS)
def test_the_folders_are_good_before(method: str, good: dict[str, Path]) -> None:
    assert imported(good[method]) is None
    assert imported(good[method], trainable=False) is None


@pytest.mark.parametrize("method", CONFIGS)
def test_a_model_without_weights(method: str, good: dict[str, Path]) -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ll.ModelStateError, match="is on the meta device.*; load the base"):
        ll.import_peft(model, good[method])
    assert not ll.adapters(model)
