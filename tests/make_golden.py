"""Writes one adapter file per variant into tests/golden: `uv run python -m tests.make_golden VARIANT…`.

Run it once for a new variant and commit the file. A file that is there is never written again: what was saved by an
earlier version must load for good.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import lora_lite as ll

from .models import net, token_ids

GOLDEN = Path(__file__).parent / "golden"
TARGETS = ("q_proj", "up_proj", "down_proj")
OWN = {
    "lora": {"rank_pattern": {"up_proj": 3}, "alpha": 6.0, "rslora": True},
    "oft": {"block_size": 8},
    "trainable_tokens": {"rows": (3, 1)},
    "dora": {"train_modules": ("lm_head",)},
}


def make(variant: str) -> None:
    path = GOLDEN / f"{variant}.safetensors"
    if path.exists():
        sys.exit(f"{path} is there already")
    base = GOLDEN / "base.safetensors"
    model = net()
    if not base.exists():
        save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, base)
    kind = ll.get_variant(variant).Config
    fields = {"r": 4} if issubclass(kind, ll.RankConfig) else {}
    if variant != "trainable_tokens":  # which names its own
        fields["target_names"] = TARGETS
    cfg = kind(**fields, **OWN.get(variant, {}))
    batches = [{"ids": token_ids(seed, (8, 5))} for seed in range(3)]
    data = {"calibration_data": batches} if variant == "eva" else {}
    adapter = ll.attach(model, cfg, seed=3, **data)
    for number, parameter in enumerate(adapter.parameters()):
        draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.add_(0.1 * draw)
    adapter.save(path)
    with torch.no_grad():
        expected = {"float32": model(token_ids()), "base": net()(token_ids())}
    save_file(expected, GOLDEN / f"{variant}.output.safetensors", {"config": json.dumps(cfg.to_dict())})


if __name__ == "__main__":
    for name in sys.argv[1:]:
        make(name)
