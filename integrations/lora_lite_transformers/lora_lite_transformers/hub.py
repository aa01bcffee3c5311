"""Adapters on the Hugging Face hub: a repository with the adapter's own file and a card that says what it is."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi
from torch import nn

from lora_lite_core import Adapter, AdapterFile, AdapterFileError, adapters, inspect, load
from lora_lite_core.attached.model_hooks.saving import FOLDER, adapter_path, write_adapters
from lora_lite_core.contract.errors import did_you_mean, listed
from lora_lite_core.contract.text import plain
from lora_lite_core.files.folders import adapter_in

CARD = "README.md"


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    name: str | None = None,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload lora-lite adapter",
) -> str:
    """Upload the adapters on the model, or one of them, as `adapters/<name>.safetensors`, with a model card that states
    variant, config, base, and the plugin's distribution and version; the base's weights are not uploaded.

    repo_id     "user/name"; made where there is none, private with private=True
    name        of one adapter; None: all
    base_model  what the card names as base; None: what the model's config says that it was loaded from
    token       as everywhere in huggingface_hub; None: that of `hf auth login`

    Returns the address of the commit. Raises AdapterNameError, ModelStateError, AdapterFileError before anything is
    uploaded, and huggingface_hub's own errors.
    """
    names = list(adapters(model)) if name is None else [name]
    with tempfile.TemporaryDirectory() as made:
        write_adapters(model, made, names or ["default"])
        files = {one: inspect(adapter_path(made, one)) for one in names}
        card = model_card(files, repo_id, base_model or _base_of(model), type(model).__name__)
        (Path(made) / CARD).write_text(card, encoding="utf-8")
        hub = HfApi(token=token)
        repo = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = hub.upload_folder(repo_id=repo, folder_path=made, revision=revision, commit_message=commit_message)
        return str(done.commit_url)


def load_from_hub(
    model: nn.Module,
    repo_id: str | os.PathLike[str],
    *,
    name: str = "default",
    revision: str | None = None,
    token: str | bool | None = None,
    trainable: bool = True,
    on_base_mismatch: Literal["error", "warn", "ignore"] = "error",
) -> Adapter:
    """`ll.load(model, "user/name")` with a revision or a token: an adapter in a repository of the hub, or in a local
    folder of that name; only its file is fetched, into huggingface_hub's cache.

    name  of the adapter in the repository and on the model; of the only one there is, just on the model

    Raises AdapterFileError where the repository holds no adapter, or several and none of that name; what `ll.load` and
    huggingface_hub raise.
    """
    here = os.path.isdir(repo_id)
    path = adapter_in(repo_id, name) if here else fetch(os.fspath(repo_id), name, revision=revision, token=token)
    return load(model, path, name=name, trainable=trainable, on_base_mismatch=on_base_mismatch)


def fetch(repo_id: str, name: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The adapter's file in a repository, in huggingface_hub's cache: what `ll.load(model, "user/name")` calls, too."""
    hub = HfApi(token=token)
    chosen = _chosen(hub.list_repo_files(repo_id, revision=revision), repo_id, name)
    return Path(hub.hf_hub_download(repo_id, chosen, revision=revision))


def _chosen(files: list[str], repo: str, name: str) -> str:
    """The adapter's file among those of a repository."""
    held = [file for file in files if file.endswith(".safetensors")]
    inner = {Path(file).stem: file for file in held if file.startswith(f"{FOLDER}/")}
    found = inner or {Path(file).stem: file for file in held if "/" not in file and not file.startswith("model")}
    if name in found:
        return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise AdapterFileError(
            f"{plain(repo)} on the hub holds no adapter, which would be {FOLDER}/{plain(name)}.safetensors\n"
            f"  it holds: {listed(map(plain, files), 5)}\n  adapters are put there by push_to_hub(model, repo_id)"
        )
    raise AdapterFileError(
        f"{plain(repo)} on the hub holds {len(found)} adapters and none is called '{plain(name)}'"
        f"{did_you_mean(name, found)}\n  they are: {listed(map(plain, found))}\n"
        f"  give name='{plain(next(iter(found)))}'"
    )


def _base_of(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def model_card(files: dict[str, AdapterFile], repo_id: str, base: str, kind: str) -> str:
    """The text of the card: what is needed to load the adapters, and what they are."""
    on_hub = base if base and not os.path.exists(base) else ""  # a path of this machine tells nobody anything
    about = [
        "library_name: lora-lite",
        "tags:",
        "- lora-lite",
        *dict.fromkeys(f"- {f.variant}" for f in files.values()),
    ]
    if on_hub:
        about = [f"base_model: {json.dumps(on_hub)}", "base_model_relation: adapter", *about]
    known = {file.plugin.get("distribution") or "" for file in files.values()} - {""}
    packages = sorted({"lora-lite-transformers", *known})
    text = ["---", *about, "---", "", f"# {repo_id.rpartition('/')[2]}", ""]
    text += [f"Adapters for `{on_hub or kind}`, made with [lora-lite](https://pypi.org/project/lora-lite-core/).", ""]
    text += [f"    pip install {' '.join(packages)}", "", "```python"]
    text += ["import lora_lite as ll", ""]
    text += [f'll.load(model, "{repo_id}", name="{name}")' for name in files]
    text += ["```", ""]
    for name, file in files.items():
        plugin = " ".join(part for part in file.plugin.values() if part) or "registered by hand"
        fields = {key: value for key, value in file.config.items() if key != "variant"}
        text += [
            f"## {name}", "", "| | |", "|---|---|", f"| variant | `{file.variant}` |", f"| plugin | {plugin} |",
            f"| lora-lite-core | {file.core_version} |", f"| base | `{on_hub or kind}` |",
            f"| layers | {len(file.targets)} |", f"| size | {file.size:,} bytes |", "",
            "```json", json.dumps(fields, indent=2), "```", "",
        ]  # fmt: skip
    return "\n".join(text)
