"""`model.save_pretrained(folder)` of an adapted model, and `ll.load(model, folder)`."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import lora_lite as ll

from .models import net

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' own
IDS = torch.arange(8)[None]


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


def adapted(*names: str, **fields: Any) -> Any:
    """Trained a little, so that adapters and base differ."""
    model = llama()
    for name in names or ("default",):
        ll.attach(model, ll.LoRAConfig(r=2, **fields), name=name)
        fields = {}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return model


def keys(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_the_base_and_each_adapter(copied: Any, tmp_path: Path) -> None:
    model = copied(adapted("default", "style", train_modules=("lm_head",)))
    outputs, before = model(IDS).logits, llama()(IDS).logits
    model.save_pretrained(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")) == [
        "adapters/default.safetensors", "adapters/style.safetensors", "model.safetensors",
    ]  # fmt: skip
    assert keys(tmp_path) == sorted(llama().state_dict())
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, before), "the base, its own head included"
    ll.load(again, tmp_path)
    ll.load(again, tmp_path, name="style")
    assert torch.equal(again(IDS).logits, outputs)


def test_only_the_instance_is_changed_and_detach_leaves_no_trace() -> None:
    model, other = llama(), llama()
    before = vars(model).keys() - {"_lora_lite_adapters"}
    ll.attach(model, ll.LoRAConfig(r=2))
    assert "save_pretrained" not in vars(other)
    ll.attach(model, ll.LoRAConfig(r=2), name="b")
    ll.detach(model, "default")
    assert "save_pretrained" in vars(model)
    ll.detach(model)
    assert vars(model).keys() == before
    own = model.save_pretrained
    model.save_pretrained = own
    ll.attach(model, ll.LoRAConfig(r=2))
    assert model.save_pretrained is not own
    ll.detach(model)
    assert vars(model)["save_pretrained"] is own


def test_a_failed_attach_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError

    model = llama()
    monkeypatch.setattr("lora_lite_core.attached.attach_detach._freeze", fail)
    with pytest.raises(RuntimeError):
        ll.attach(model, ll.LoRAConfig(r=2))
    assert "save_pretrained" not in vars(model)


def test_what_cannot_be_saved_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = llama()
    ll.attach(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.ModelStateError, match="adapter 'default' has no values yet"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_state_dict_that_is_given_is_written_as_it_is(tmp_path: Path) -> None:
    """transformers' Trainer gives one, None too, and resumes from the tensors in it."""
    model = adapted()
    model.save_pretrained(tmp_path, state_dict=None)
    assert keys(tmp_path) == sorted(model.state_dict())
    assert (tmp_path / "adapters/default.safetensors").exists()


def test_a_class_that_also_has_save(tmp_path: Path) -> None:
    """As sentence-transformers, whose `save` has each of its parts save itself."""

    class Sentences(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def save(self, path: Path, name: str | None = None, card: bool = True) -> None:
            self.inner.save_pretrained(path)

        def save_pretrained(self, path: Path) -> None:
            self.save(path)

    model = Sentences()
    ll.attach(model, ll.LoRAConfig(r=2))
    for place, save in enumerate((lambda to: model.save(to, None, True), lambda to: model.save_pretrained(to))):
        save(tmp_path / str(place))
        assert keys(tmp_path / str(place)) == sorted(llama().state_dict())
        assert (tmp_path / str(place) / "adapters/default.safetensors").exists()
    view = ll.reference_view(model)
    assert not {"save", "save_pretrained"} & vars(view).keys()
    ll.detach(model)
    assert not {"save", "save_pretrained"} & vars(model).keys()


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "a", is_main_process=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_state_dict_taken_by_another_thread_meanwhile_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = adapted(), []
    wanted = list(model.state_dict())

    def look(self: Any, *_: Any, **__: Any) -> None:
        thread = threading.Thread(target=lambda: seen.append(list(self.state_dict())))
        thread.start()
        thread.join()
        seen.append(list(self.state_dict()))

    monkeypatch.setattr(type(model), "save_pretrained", look)
    model.save_pretrained(tmp_path)
    assert seen == [wanted, list(llama().state_dict())]
    assert list(model.state_dict()) == wanted


# --- loading from a folder ---------------------------------------------------------------------------------------------


def test_the_only_adapter_of_a_folder_whatever_its_name(tmp_path: Path) -> None:
    model = net()
    ll.attach(model, ll.LoRAConfig(r=2), name="style")
    ll.save(model, tmp_path / "some.safetensors", name="style")
    ll.detach(model)
    assert ll.load(model, tmp_path).name == "default"


def test_a_folder_of_peft_says_what_opens_it(tmp_path: Path) -> None:
    model = net()
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ll.AdapterFileError) as caught:
        ll.load(model, tmp_path)
    assert str(caught.value) == f"{tmp_path} is a folder of PEFT's; type: import_peft(model, '{tmp_path}')"


def test_folders_that_do_not_say_which(tmp_path: Path) -> None:
    model = net()
    with pytest.raises(ll.AdapterFileError) as caught:
        ll.load(model, tmp_path)
    assert f"{tmp_path} holds no adapter: neither" in str(caught.value)
    assert "adapters are written by save(model, path), and by model.save_pretrained(folder)" in str(caught.value)
    ll.attach(model, ll.LoRAConfig(r=2))
    for name in ("one", "two"):
        ll.save(model, tmp_path / f"{name}.safetensors")
    ll.detach(model)
    with pytest.raises(ll.AdapterFileError) as caught:
        ll.load(model, tmp_path, name="ones")
    assert str(caught.value) == (
        f"{tmp_path} holds 2 adapters and none is called 'ones'; did you mean 'one'?\n"
        "  they are: one, two\n  give name='one', or the path of its file"
    )
    assert not ll.adapters(model)
