"""ParamSpec: contradictions are refused where they are written."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ll.ParamSpec(()), "a 0-dimensional tensor cannot be sharded; use shape=(1,)"),
        (lambda: ll.ParamSpec((0, 2)), "every size must be a whole number of at least 1"),
        (lambda: ll.ParamSpec((2.0,)), "every size must be a whole number"),
        (lambda: ll.ParamSpec((2,), init="zero"), "ParamSpec(init='zero') is not a named init; did you mean 'zeros'?\n  named inits: zeros"),
        (lambda: ll.ParamSpec((2,), trainable=True, as_buffer=True), "a buffer cannot be trained"),
        (lambda: ll.ParamSpec((2,), persistent=False), "what is trained must be saved"),
        (
            lambda: ll.ParamSpec((2,), trainable=False, persistent=False, dtype=torch.int64),
            "what is computed anew at load may come out another way; save it",
        ),
        (lambda: ll.ParamSpec((2,), dtype=torch.int64), "only floating-point tensors can be trained"),
    ],
)  # fmt: skip
def test_contradictions(make: object, message: str) -> None:
    with pytest.raises(ll.ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_trainable_follows_as_buffer() -> None:
    assert ll.ParamSpec((2,)).trainable is True
    assert ll.ParamSpec((2,), as_buffer=True).trainable is False
    assert ll.ParamSpec((2,), trainable=False).trainable is False


def test_kaiming_uniform_is_bounded_by_the_last_dimension() -> None:
    tensor = torch.empty(64, 100)
    ll.ParamSpec((64, 100), init="kaiming_uniform").fill(tensor, torch.Generator().manual_seed(0))
    assert 0.099 < float(tensor.abs().max()) <= 0.1
    assert abs(float(tensor.mean())) < 0.003
