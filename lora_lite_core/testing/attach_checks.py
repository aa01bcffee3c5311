"""Promises about the config, the tensors and step 0."""

from __future__ import annotations

import contextlib
import io
import json
import random
import warnings
from collections.abc import Iterator

import torch

from ..attached.tensors.declared import specs_for
from ..contract.config import AdapterConfig
from ..contract.target import Target
from ..discovery.registry import LoraLiteConfig
from ..layers.kinds.layer_kinds import layer_sizes
from .check import promise
from .variant_under_test import Subject, close, must


@promise("read the message: it says what is wrong, and where it can, at which line")
def check_attaches(s: Subject) -> None:
    """The adapter can be put on a model of linear layers, run, and taken off."""
    s.attach_and_run()


@promise("give fields plain values: numbers, strings, booleans, None, flat tuples or string-keyed dicts of these")
def check_config_survives_json(s: Subject) -> None:
    """A config that is written to JSON and read again is equal."""
    again: AdapterConfig = LoraLiteConfig(**json.loads(json.dumps(s.given.to_dict())))
    must(again == s.given, f"{again} instead of {s.given}")


@promise("let param_specs compute shapes from d_in, d_out and cfg alone, and leave values to init")
def check_specs_are_pure(s: Subject) -> None:
    """param_specs gives the same specs every time, for every layer of that size, and touches nothing."""
    model, twin = s.model(), s.model(seed=1)
    before = torch.get_rng_state()
    for (name, layer), other in zip(model.named_children(), twin.children(), strict=True):
        d_in, d_out = layer_sizes(layer) or (s.sizes[0], s.sizes[0])
        targets = [Target(name, one, d_in, d_out, s.cfg, s.variant, "default") for one in (layer, layer, other)]
        first, second, third = map(specs_for, targets)
        for specs in (second, third):
            kinds = [{n: (x.shape, x.trainable, x.as_buffer, x.dtype) for n, x in y.items()} for y in (first, specs)]
            must(kinds[0] == kinds[1], f"{kinds[0]} at first, then {kinds[1]}")
        must(any(spec.trainable for spec in first.values()), f"no tensor of {name} is trainable")
    must(torch.equal(torch.get_rng_state(), before), "the global random state has moved")


@promise(
    "start one factor at zeros, or train an offset from zero; compute the change apart, return y + change.to(y.dtype). "
    "Where it cannot be exact, declare IDENTITY_ATOL and IDENTITY_REASON"
)
def check_identity_at_start(s: Subject) -> None:
    """A fresh adapter changes nothing: the output is the frozen model's, bit for bit in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        model, x = s.model(dtype), s.x(dtype=dtype)
        with torch.no_grad():
            base = model(x)
            s.attach(model)
            rounding = 0.0 if dtype == torch.float32 else 1e-2 * bool(s.identity_tol)
            close(model(x), base, max(s.identity_tol, rounding), f"the output in {dtype}")


@promise("fill tensors from `generator` or the weight in init, not from torch.randn or random without it")
def check_start_depends_on_the_seed_alone(s: Subject) -> None:
    """Attached twice with the same seed the tensors are the same, whatever was drawn before in between."""
    first, second = (dict(s.attach(s.model()).named_tensors()) for _ in _with_other_randomness())
    for name, tensor in first.items():
        close(second[name].detach(), tensor.detach(), 0, name)


def _with_other_randomness() -> Iterator[int]:
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            yield seed


@promise(
    "make each layer's tensors from that layer alone; what needs several layers at once is done in group_init, and "
    "nothing is kept in module variables"
)
def check_start_does_not_depend_on_other_layers(s: Subject) -> None:
    """A layer's tensors are the same whether it is adapted alone or with others; group_init may take layers out and
    change their shapes."""
    together = dict(s.attach(s.model()).named_tensors())
    for name in ("mix", "up"):
        for key, tensor in s.attach(s.model(), target_names=(f"^{name}$",)).named_tensors():
            if s.variant.group_init and (key not in together or together[key].shape != tensor.shape):
                continue
            must(key in together, f"{key} is not there when all layers are adapted")
            close(tensor.detach(), together[key].detach(), 1e-6, key)


@promise("remove prints, draw from the hook's `generator` only, and mend what torch warns about")
def check_quiet(s: Subject) -> None:
    """Attaching, training and saving print nothing, raise no warning and leave the global random state alone."""
    torch.manual_seed(0)
    random.seed(0)
    model, states = s.model(), (torch.get_rng_state(), random.getstate())
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        s.attach(model)
        model(s.x()).sum().backward()
    must(not printed.getvalue(), f"printed {printed.getvalue()[:200]!r}")
    must(not caught, f"warned: {[str(warning.message) for warning in caught[:3]]}")
    must(torch.equal(torch.get_rng_state(), states[0]), "torch's global random state has moved")
    must(random.getstate() == states[1], "Python's global random state has moved")
