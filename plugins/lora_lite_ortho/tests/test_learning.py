"""Every variant of this package learns the bench's task."""

from __future__ import annotations

from typing import Any

import pytest

import lora_lite as ll

FIELDS: dict[str, dict[str, Any]] = {"psoft": {"r": 8}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitfit", "boft", "ln_tuning", "psoft", "red", "ssf"])
def test_it_learns(name: str) -> None:
    from lora_lite_bench.runs.run import Job, run

    lr = ll.get_variant(name).bench["lr"]
    job = Job("shifted", {"batch_size": 64}, name, FIELDS.get(name, {}), seed=0, lr=lr, steps=30, whole=False)
    losses = run(job).losses
    assert sum(losses[-3:]) / 3 < 0.3 * losses[0], losses
