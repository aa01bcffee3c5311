"""Up to the hub and down again, against a local stand-in for the parts of its HTTP API that are used."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lite_transformers import hub as hub_module
from lora_lite_transformers import load_from_hub, push_to_hub

import lora_lite as ll

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # huggingface_hub's own
SHA = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """One repository by name: {"user/name": {path: content}}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.seen: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, text in {"X-Repo-Commit": SHA, **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body, server = self._body(), self.server
        server.seen.append(f"POST {self.path}")
        if self.path == "/api/repos/create":
            said = json.loads(body)
            name = "/".join(part for part in (said.get("organization") or "user", said["name"]) if part)
            server.repositories.setdefault(name, {})
            return self._answer({"url": f"{server.address}/{name}", "id": name, "name": name})
        if self.path.endswith("/validate-yaml"):
            return self._answer({"errors": [], "warnings": []})
        name, what = re.match(r"/api/models/([^/]+/[^/]+)/(\w+)/", self.path + "/").groups()  # type: ignore[union-attr]
        files = server.repositories[name]
        if what == "preupload":
            asked = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in asked]
            return self._answer({"files": told})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        address = f"{server.address}/{name}/commit/{SHA}"
        return self._answer({"success": True, "commitOid": SHA, "commitUrl": address, "hookOutput": ""})

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            files = self.server.repositories.get(found[1])
            if files is None:
                return self._answer({"error": "no repository"}, 404, X_Error_Code="RepoNotFound")
            rest = found[2] or ""
            if "/tree/" in rest:
                return self._answer([{"type": "file", "path": f, "size": len(d), "oid": "1"} for f, d in files.items()])
            siblings = [{"rfilename": name} for name in files]
            return self._answer({"id": found[1], "modelId": found[1], "sha": SHA, "siblings": siblings, "tags": []})
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        data = self.server.repositories.get(found[1], {}).get(found[2]) if found else None
        if data is None:
            return self._answer({"error": "no file"}, 404, X_Error_Code="EntryNotFound")
        return self._answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"')

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setattr(
        hub_module, "HfApi", lambda token=None: Here(endpoint=server.address, token=token or "hf_none", cache=tmp_path / "cache")
    )  # fmt: skip
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class Here(hub_module.HfApi):
    """The client, with the cache in a folder of the test."""

    def __init__(self, *, cache: Path, **more: Any) -> None:
        super().__init__(**more)
        self.cache = cache

    def hf_hub_download(self, *args: Any, **more: Any) -> Any:
        return super().hf_hub_download(*args, cache_dir=self.cache, **more)


def adapted(model: Any, *names: str) -> Any:
    for name in names or ("default",):
        ll.attach(model, ll.HRAConfig(r=2) if name != "gates" else ll.IA3Config(), name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return model


def test_up_and_down(hub: Hub, llama: Any, ids: torch.Tensor) -> None:
    model = adapted(llama(), "default", "gates")
    url = push_to_hub(model, "user/mine", base_model="somebody/base")
    assert url == f"{hub.address}/user/mine/commit/{SHA}"
    assert set(hub.repositories["user/mine"]) == {
        "README.md", "adapters/default.safetensors", "adapters/gates.safetensors"
    }  # fmt: skip
    again = llama()
    assert load_from_hub(again, "user/mine").name == "default"
    load_from_hub(again, "user/mine", name="gates", trainable=False)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not any(one.requires_grad for one in ll.adapters(again)["gates"].parameters())
    plain = llama()
    ll.load(plain, "user/mine"), ll.load(plain, "user/mine", name="gates")
    assert torch.equal(plain(ids).logits, model(ids).logits)
    with torch.no_grad():
        next(iter(ll.adapters(plain)["gates"].parameters())).zero_()
    ll.load_into(plain, "user/mine", name="gates")
    assert torch.equal(plain(ids).logits, model(ids).logits)
    push_to_hub(model, "user/one", name="gates")
    other = llama()
    assert load_from_hub(other, "user/one", name="mine").record.variant.name == "ia3"


def test_the_card(hub: Hub, llama: Any) -> None:
    push_to_hub(adapted(llama()), "user/mine", base_model="somebody/base")
    card = hub.repositories["user/mine"]["README.md"].decode()
    version = ll.__version__
    for part in (
        'base_model: "somebody/base"', "library_name: lora-lite", "- hra", "| variant | `hra` |",
        f"| plugin | lora-lite-ortho {version} |", f"| lora-lite-core | {version} |", "| base | `somebody/base` |",
        '"r": 2', "pip install lora-lite-ortho lora-lite-transformers", 'll.load(model, "user/mine", name="default")',
    ):  # fmt: skip
        assert part in card, card


def test_no_path_of_this_machine_is_told(hub: Hub, llama: Any, tmp_path: Path) -> None:
    model = adapted(llama())
    model.config._name_or_path = str(tmp_path)
    push_to_hub(model, "user/mine")
    card = hub.repositories["user/mine"]["README.md"].decode()
    assert str(tmp_path) not in card
    assert "base_model" not in card
    assert "| base | `LlamaForCausalLM` |" in card


def test_what_is_not_there(hub: Hub, llama: Any, tmp_path: Path) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    model = llama()
    with pytest.raises(ll.AdapterNameError):
        push_to_hub(model, "user/mine")
    assert not hub.seen, "nothing was uploaded, and no repository made"
    with pytest.raises(RepositoryNotFoundError):
        load_from_hub(model, "user/mine")
    with pytest.raises(
        ll.AdapterFileError, match="no file or folder user/mine here, and lora-lite-transformers cannot"
    ):
        ll.load(model, "user/mine")
    hub.repositories["user/mine"] = {"model.safetensors": b"", "config.json": b"{}"}
    with pytest.raises(ll.AdapterFileError) as caught:
        load_from_hub(model, "user/mine")
    assert str(caught.value) == (
        "user/mine on the hub holds no adapter, which would be adapters/default.safetensors\n"
        "  it holds: model.safetensors, config.json\n  adapters are put there by push_to_hub(model, repo_id)"
    )
    hub.repositories["user/mine"] = {"adapters/one.safetensors": b"", "adapters/two.safetensors": b""}
    with pytest.raises(ll.AdapterFileError, match="holds 2 adapters and none is called 'twos'; did you mean 'two'"):
        load_from_hub(model, "user/mine", name="twos")
    hub.repositories["user/mine"] = {"adapters/one.safetensors": b"{} not an adapter"}
    with pytest.raises(ll.AdapterFileError):
        load_from_hub(model, "user/mine")
    assert not ll.adapters(model)


def test_another_base_model(hub: Hub, llama: Any) -> None:
    model = llama()
    ll.attach(model, ll.PiSSAConfig(r=2))
    push_to_hub(model, "user/mine")
    with pytest.raises(ll.BaseMismatch, match="was made on another base model"):
        load_from_hub(llama(1), "user/mine")


def test_a_local_folder(llama: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    model = adapted(llama())
    model.save_pretrained(tmp_path)
    again = llama()
    load_from_hub(again, tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
