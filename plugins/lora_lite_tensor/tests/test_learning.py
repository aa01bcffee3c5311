"""Every variant of the package learns the bench's task."""

from __future__ import annotations

import pytest

import lora_lite as ll


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compacter", "krona", "loha", "lokr", "loretta", "quanta"])
def test_it_learns(name: str) -> None:
    from lora_lite_bench.runs.run import Job, run

    lr = ll.get_variant(name).bench["lr"]
    losses = run(Job("shifted", {"batch_size": 64}, name, {}, seed=0, lr=lr, steps=30, whole=False)).losses
    assert sum(losses[-3:]) / 3 < 0.3 * losses[0], losses
