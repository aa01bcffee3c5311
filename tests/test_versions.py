"""The contract has a version, and changes of it break nobody without a warning."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite_core.contract import hookspecs
from lora_lite_core.contract import variant_validation as contract

from .models import net, token_ids

# Every version that there was. A change of hooks or arguments adds a row here, and one to CONTRACT_VERSION.
VERSIONS = {
    1: {
        "param_specs": ["d_in", "d_out", "cfg", "layer"],
        "init": ["layer", "params", "cfg", "name", "generator"],
        "group_init": ["model", "targets", "cfg", "calibration_data"],
        "forward_input": ["x", "params", "cfg", "layer"],
        "forward": ["x", "y", "params", "cfg", "layer"],
        "fingerprint": ["layer", "cfg"],
    },
}
VERSIONS[2] = VERSIONS[1] | {"to_peft": ["params", "cfg", "layer"], "from_peft": ["config", "tensors", "layer"]}
VERSIONS[3] = VERSIONS[2] | {
    "param_specs": ["d_in", "d_out", "cfg", "layer", "name"],
    "forward_input": ["x", "params", "cfg", "layer", "training", "context"],
    "forward": ["x", "y", "params", "cfg", "layer", "training", "context"],
    "before_step": ["targets", "cfg", "step"],
    "penalty": ["params", "cfg"],
    "to_peft": ["params", "cfg", "layer", "name", "sizes"],
    "from_peft": ["config", "tensors", "layer", "name", "sizes"],
}


def test_the_version_counts_changes() -> None:
    now = {name: list(inspect.signature(getattr(hookspecs, name)).parameters) for name in contract.HOOKS}
    assert max(VERSIONS) == ll.CONTRACT_VERSION
    assert VERSIONS[ll.CONTRACT_VERSION] == now


def with_another_forward(monkeypatch: pytest.MonkeyPatch, forward: Any) -> None:
    """A core whose contract has this `forward` instead."""
    specs = SimpleNamespace(**{name: getattr(hookspecs, name) for name in contract.HOOKS if name != "forward"})
    specs.forward = forward
    manager = pluggy.PluginManager("lora_lite")
    manager.add_hookspecs(specs)
    monkeypatch.setattr(contract, "_manager", manager)


def test_a_plugin_of_the_older_contract_runs_under_a_newer_one(
    monkeypatch: pytest.MonkeyPatch, registered: Any, toy: SimpleNamespace
) -> None:
    @hookspecs.hookspec(firstresult=True)
    def forward(
        x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: Any, layer: nn.Module, coefficient: float
    ) -> None:
        """With an argument more."""

    with_another_forward(monkeypatch, forward)
    registered(toy, name="toy")
    model = net()
    before = model(token_ids())
    ll.attach(model, ll.ToyConfig())
    assert torch.equal(model(token_ids()), before)


def test_an_argument_that_is_to_go_warns_at_the_line_of_the_plugin(
    monkeypatch: pytest.MonkeyPatch, registered: Any, toy: SimpleNamespace
) -> None:
    message = "forward's `layer` goes with lora-lite-core 0.3; read what you need in init"

    @hookspecs.hookspec(firstresult=True, warn_on_impl_args={"layer": DeprecationWarning(message)})
    def forward(x: Tensor, y: Tensor, params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> None:
        """One argument is on its way out."""

    with_another_forward(monkeypatch, forward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registered(toy, name="toy")  # names y and params only

    @ll.hookimpl
    def uses_layer(y: Tensor, params: dict[str, Tensor], layer: nn.Module) -> Tensor:
        return y + params["lora_h"].to(y.dtype)

    uses_layer.__name__ = "forward"
    toy.forward = uses_layer
    with pytest.warns(DeprecationWarning, match="goes with lora-lite-core 0.3") as caught:
        registered(toy, name="toy")
    assert caught[0].filename == __file__
    assert caught[0].lineno == uses_layer.__code__.co_firstlineno
