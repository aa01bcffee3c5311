"""Promises about files, copies, other adapters, and other kinds of layers."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..attached.adapter import Adapter, adapters, detach
from ..attached.switching.choosing import disabled
from ..contract.errors import AdapterFileError, BaseMismatch, LoraLiteError, MergeError
from ..files.load import load
from ..files.peft.exporting import export_peft
from ..files.peft.importing import import_peft
from ..files.save import save
from .check import promise
from .variant_under_test import CheckFailed, Net, Packed, Subject, close, must, weights_hash


@promise(
    "put what the method needs into tensors of param_specs (persistent unless init can compute it from the base again)"
)
def check_reload_on_a_fresh_model(s: Subject) -> None:
    """Saved and loaded onto a fresh base, without data or randomness, the adapter computes the same."""
    _reload(s, onto_itself=False, name="default")


@promise("leave no trace on the layer: everything of the method is in tensors of param_specs")
def check_reload_on_the_same_model(s: Subject) -> None:
    """Saved, detached and loaded again on the same model, the adapter computes the same."""
    _reload(s, onto_itself=True, name="default")


@promise("read tensors from `params` by their bare names; the layer's attributes are called after the adapter")
def check_reload_under_another_name(s: Subject) -> None:
    """Loaded under another adapter name, the adapter computes the same."""
    _reload(s, onto_itself=False, name="another")


def _reload(s: Subject, *, onto_itself: bool, name: str) -> None:
    model, _ = s.trained()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path, expected = Path(folder) / "adapter.safetensors", model(s.x())
        save(model, path)
        detach(model)
        target = model if onto_itself else s.model()
        load(target, path, name=name)
        close(target(s.x()), expected, 1e-6, "the output after loading")


@promise("add the hook `fingerprint` and return sketch(layer): frozen tensors that were made of the base fit no other")
def check_wrong_base_is_refused(s: Subject) -> None:
    """An adapter whose frozen tensors were made of the base's weights is not loaded onto another base."""
    model, _ = s.trained()
    ours, theirs = (_frozen(s.attach(s.model(seed=seed))) for seed in (0, 1))
    depends = [name for name, tensor in ours.items() if not torch.allclose(tensor, theirs[name], atol=1e-6)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save(model, path)
        try:
            load(s.model(seed=1), path)
        except BaseMismatch:
            return
        must(not depends, f"{depends} differ between two bases, and a file made on one was loaded onto the other")


@promise("save it (leave persistent=False out): only norms and the like can be made again at load")
def check_unsaved_tensors_are_continuous(s: Subject) -> None:
    """A tensor that is not saved is the same for every seed, and nearly the same on a base that differs by rounding."""

    def unsaved(noise: float, seed: int) -> dict[str, Tensor]:
        model, draws = s.model(), torch.Generator().manual_seed(3)
        for layer in (model.up, model.down, model.mix):  # all singular values equal: their vectors are arbitrary
            torch.nn.init.orthogonal_(layer.weight, generator=draws)
            layer.weight.data.mul_(1 + noise * torch.randn(layer.weight.shape, generator=draws))
        adapter = s.attach(model, seed=seed)
        return {name: tensor.detach() for name, tensor in adapter.named_tensors() if name not in _saved(adapter)}

    here, seeded, rounded = unsaved(0, 0), unsaved(0, 1), unsaved(1e-4, 0)
    for name, tensor in here.items():
        close(seeded[name], tensor, 0, f"{name}, which is not saved, with another seed")
        close(rounded[name], tensor, 1e-2, f"{name}, which is not saved, on a base that differs by 1e-4")


def _frozen(adapter: Adapter) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in adapter.named_tensors() if n in _saved(adapter) and not t.requires_grad}


def _saved(adapter: Adapter) -> set[str]:
    layers = adapter.layers().items()
    own = {f"{name}.{bare}" for name, target in layers for bare in target.saved}
    return own | {shared.key for _, target in layers for shared in target.shared.values() if shared.key}


@promise("keep nothing outside `params`: adapters share the layer, and each has tensors of its own")
def check_two_adapters_on_one_layer(s: Subject) -> None:
    """Two adapters of the variant on the same layers do not disturb each other."""
    first, one = s.trained()
    second = s.model()
    two = s.attach(second)
    for tensor in two.parameters():
        tensor.data.add_(0.01)
    model = s.model()
    for name, source in (("one", one), ("two", two)):
        values = dict(source.named_tensors())
        for key, tensor in s.attach(model, name).named_tensors():
            tensor.data.copy_(values[key])
    with torch.no_grad():
        with disabled(model, "two"):
            close(model(s.x()), first(s.x()), 1e-6, "the first adapter, the second one being off")
        detach(model, "one")
        close(model(s.x()), second(s.x()), 1e-6, "the second adapter, the first one being gone")
        s.attach(model, "three")
        before = model(s.x())
        for parameter in adapters(model)["three"].parameters():
            parameter.add_(0.05)
        must(not torch.equal(model(s.x()), before), "beside the second, a third adapter does nothing")


@promise("act through forward and forward_input alone; do not replace the layer's forward or its weight")
def check_disabled_is_the_base(s: Subject) -> None:
    """Inside disabled(model) and after detach the output is the frozen model's, bit for bit."""
    model, _ = s.trained()
    with torch.no_grad():
        base = s.model()(s.x())
        must(not torch.equal(model(s.x()), base), "after three steps of training the output is still the base's")
        with disabled(model):
            close(model(s.x()), base, 0, "the output inside disabled(model)")
        detach(model)
        close(model(s.x()), base, 0, "the output after detach")


@promise("use the `layer` and `params` that are passed in, no closure over others; define the config at module level")
def check_copies_are_independent(s: Subject) -> None:
    """copy.deepcopy and pickle give models that compute the same and share nothing with the original."""
    model, _ = s.trained()
    expected = model(s.x()).detach()
    for how, made in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        close(made(s.x()).detach(), expected, 1e-6, f"the output of a {how}")
        for parameter in adapters(made)["default"].parameters():
            parameter.data.add_(0.05)
        must(not torch.equal(made(s.x()).detach(), expected), f"a {how} does not follow its own parameters")
        close(model(s.x()).detach(), expected, 0, f"the original after its {how} was changed")


@promise("let from_peft undo to_peft: the same fields and, after rounding, the same tensors")
def check_peft_round_trip(s: Subject) -> None:
    """What to_peft writes of a layer, from_peft reads back, where a variant has both; what before_step keeps for itself
    need not be in PEFT's file, where the layer computes the same without. A form that from_peft leaves to another
    variant, a LoRA say, computes the same when that reads it."""
    to_peft, from_peft = s.variant.to_peft, s.variant.from_peft
    if to_peft is None or from_peft is None:
        return
    model, adapter = s.trained()
    sizes = {name: (target.d_in, target.d_out) for name, target in adapter.layers().items()}
    for name, target in adapter.layers().items():
        layer = model.get_submodule(name)
        params = {bare: tensor.detach() for bare, tensor in target.params.items()}
        try:
            about = {"layer": layer, "name": name, "sizes": sizes}
            config, tensors = to_peft({"params": params, "cfg": target.cfg, **about})
        except MergeError:
            return  # a form of the method that PEFT has not
        back = from_peft({"config": config, "tensors": tensors, **about})
        if back is None:
            _read_by_another(s, model, f"from_peft does not know what to_peft wrote of {name}: {config}")
            return
        again = dict(back[1])
        saved = [*target.saved, *(bare for bare, shared in target.shared.items() if shared.key)]
        must(set(again) == set(saved), f"{sorted(again)} came back of {sorted(saved)}")
        read = {bare: again[bare].reshape(params[bare].shape) for bare in saved}
        for bare in saved:
            if s.variant.before_step is None or target.params[bare].requires_grad:
                close(read[bare], params[bare], 1e-4, f"{bare} of {name}")
        if s.variant.before_step is not None:
            x = torch.randn(4, target.d_in, generator=torch.Generator().manual_seed(0))
            given = {"x": x, "y": torch.zeros(4, target.d_out), "cfg": target.cfg, "layer": layer, "training": False}
            for hook in filter(None, (s.variant.forward_input, s.variant.forward)):
                got, expected = (hook({**given, "params": p, "context": {}}) for p in ({**params, **read}, params))
                close(got, expected, 1e-4, f"what {name} computes with what came back")


def _read_by_another(s: Subject, model: Net, seen: str) -> None:
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        other = s.model()
        export_peft(model, Path(place) / "exported")
        try:
            import_peft(other, Path(place) / "exported")
        except AdapterFileError as error:
            raise CheckFailed(f"{seen}; nor does another variant: {error}") from error
        close(other(s.x()), model(s.x()), 1e-4, f"what another variant makes of it ({seen})")


@promise(
    "read weights through dense_weight(layer), run the layer through base_forward(layer, x), or raise UnsupportedLayer"
)
def check_quantised_layers(s: Subject) -> None:
    """On a layer with a packed weight it computes what it does on the dense twin, or is refused without a trace."""
    if s.of_blocks:  # which have no weight of their own
        return
    packed, dense = s.model(), s.model()
    for name in ("up", "mix"):
        layer = Packed(getattr(packed, name))
        setattr(packed, name, layer)
        getattr(dense, name).weight.data.copy_(layer.dense())
    before, keys = weights_hash(packed), list(packed.state_dict())
    try:
        s.attach(packed)
    except LoraLiteError as error:
        must(not isinstance(error, BaseMismatch), str(error))
        must(list(packed.state_dict()) == keys and not adapters(packed), "the refusal leaves tensors behind")
        return
    s.attach(dense)
    for model in (packed, dense):
        for number, parameter in enumerate(adapters(model)["default"].parameters()):
            draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data.add_(0.05 * draw)
    close(packed(s.x()).detach(), dense(s.x()).detach(), 1e-3, "the output on packed layers")
    must(weights_hash(packed) == before, "the packed weight has changed")
