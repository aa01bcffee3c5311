"""Methods of other starts and of changing ranks learn the bench's smallest task."""

from __future__ import annotations

import pytest

import lora_lite as ll

NAMES = ["adalora", "corda", "dylora", "kasa", "lora_ga", "lora_sb", "olora", "sora"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str) -> None:
    from lora_lite_bench.runs.run import Job, run

    lr = ll.get_variant(name).bench["lr"]
    losses = run(Job("shifted", {"batch_size": 64}, name, {}, seed=0, lr=lr, steps=30, whole=False)).losses
    assert sum(losses[-3:]) / 3 < 0.3 * losses[0], losses
