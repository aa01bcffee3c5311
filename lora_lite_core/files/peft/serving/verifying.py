"""Does an engine that has loaded an exported folder generate what the adapter does? By the folder's check prompt.

An engine is a callable of the entry-point group `lora_lite.engines`:

    generate(base: str, folder: Path, prompt: list[int], count: int) -> list[int]

`count` token ids, each the likeliest one after those before it, of the base model called `base` (a folder or a name)
with the LoRA in `folder`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ....contract.errors import AdapterFileError, MergeError, MissingPlugin, ModelStateError, did_you_mean, listed
from ....contract.text import plain, told
from ....contract.untrusted_input import parse_json, read_regular
from ....discovery.entry_points import entries
from ..folder_reading import MOST, REPORT
from .check_prompt import greedy
from .report import CheckPrompt, check_of

GROUP = "lora_lite.engines"
Engine = Callable[[str, Path, list[int], int], Sequence[int]]


def verify_export(directory: str | os.PathLike[str], base: str, *, engine: str = "peft") -> CheckPrompt:
    """Let an engine load the folder that `export_lora(…, check=True)` has written, and generate from its check prompt.

    base    folder or name of the base model, as transformers and servers load it
    engine  "peft" (transformers with the peft package), "vllm" (`pip install lora-lite-vllm`), or another package's

    Returns the check prompt, whose tokens the engine has generated. Raises MergeError where it generates others, and
    says whether they are those of the base alone, that is, whether it has left the adapter out; AdapterFileError for a
    folder without a check prompt or with one that proves nothing, MissingPlugin for an unknown engine.
    """
    folder = Path(directory)
    check = _read(folder)
    found = [*_engine(engine)(base, folder, check.prompt, len(check.tokens))]
    if found == check.tokens:
        return check
    alone = "; the base alone generates the same, so that the adapter has had no effect there"
    ours = "" if found != check.base_tokens[: len(found)] else alone
    raise MergeError(
        f"{engine} generates {found} from the check prompt {check.prompt}\n  the adapter gives {check.tokens}{ours}"
    )


def _read(folder: Path) -> CheckPrompt:
    try:
        check = check_of(parse_json(read_regular(folder / REPORT, MOST)))
    except (OSError, ValueError, AttributeError) as error:
        why = getattr(error, "strerror", None) or error
        raise AdapterFileError(f"{plain(folder / REPORT)} cannot be read: {plain(why)}") from None
    if check is None:
        raise AdapterFileError(f"{plain(folder)} holds no check prompt; write it by export_lora(…, check=True)")
    if not check.tells:
        raise AdapterFileError(
            f"the check prompt of {plain(folder)} proves nothing: the base alone generates the same {check.tokens}; "
            "export with check=[token ids] of a prompt on which the adapter shows"
        )
    return check


def _engine(name: str) -> Engine:
    if name == "peft":
        return with_peft
    installed = {entry.name: entry for entry in entries(GROUP, objects=True)}
    if name not in installed:
        known = sorted({"peft", *installed})
        hint = "\n  type: pip install lora-lite-vllm" if name == "vllm" else ""
        raise MissingPlugin(
            f"no engine is called {plain(repr(name))}{did_you_mean(name, known)}\n  engines: {listed(known)}{hint}"
        )
    try:
        return installed[name].load()
    except Exception as error:
        raise MissingPlugin(f"engine '{plain(name)}' cannot be imported: {told(error)}") from error


def with_peft(base: str, folder: Path, prompt: list[int], count: int) -> list[int]:
    """The engine "peft": the base as transformers loads it, the folder as PeftModel does."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingPlugin("the engine 'peft' takes the peft package; type: pip install peft") from error
    model: Any = PeftModel.from_pretrained(load_base(base), str(folder))
    return greedy(model.eval(), prompt, count)[0]


def load_base(base: str) -> nn.Module:
    """A model of the architecture that its config names, by transformers; ModelStateError where that cannot be."""
    try:
        import transformers
    except ImportError as error:
        raise ModelStateError("loading a base model takes transformers; type: pip install transformers") from error
    try:
        config: Any = transformers.AutoConfig.from_pretrained(base)
        kind: Any = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        model, report = kind.from_pretrained(base, dtype="auto", output_loading_info=True)
    except Exception as error:  # whatever transformers, and what it uses, make of a folder
        raise ModelStateError(f"--base {base} cannot be loaded by transformers: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelStateError(f"--base {base} lacks {listed(missing, 4)}, which would be random; give the whole model")
    return model
