"""What an export for servers has lost and kept, layer by layer, as the folder itself says it, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ....contract.text import count, plain, table


@dataclass(frozen=True)
class LayerLoss:
    """Of one layer: the rank that its change ΔW needs, the one it was written with, the relative error of ΔW."""

    needed: int
    rank: int
    error: float


@dataclass(frozen=True)
class CheckPrompt:
    """A prompt and what greedy generation makes of it, as token ids: with the adapter, and with the base alone.

    `tokens` ends before the first choice that was too close to be the same on another machine.
    """

    prompt: list[int]
    tokens: list[int]
    base_tokens: list[int]

    @property
    def tells(self) -> bool:
        """Whether the adapter makes a difference here; where it does not, the prompt proves nothing."""
        return self.tokens != self.base_tokens[: len(self.tokens)]


@dataclass
class LoRAExport:
    """What `export_lora` has written: the rank of all layers, each one's loss, and what else the folder says.

    errors   relative error of the change ΔW, by the layer's path in the model that was exported
    layers   the same with ranks
    renamed  {path: path in the served model} where they differ
    check    the check prompt, or None
    """

    directory: Path
    rank: int
    errors: dict[str, float] = field(default_factory=dict)
    layers: dict[str, LayerLoss] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    check: CheckPrompt | None = None

    def __repr__(self) -> str:
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"<LoRAExport: rank {self.rank}, {count(len(self.errors), 'layer')} in {plain(self.directory)}, "
            f"relative error of ΔW at most {self.errors[worst]:.1e} ({worst})>"
        )

    def __str__(self) -> str:
        """A table with one row a layer, worst first."""
        worst = sorted(self.layers.items(), key=lambda one: -one[1].error)
        rows = [(self.renamed.get(path, path), own.needed, own.rank, f"{own.error:.1e}") for path, own in worst]
        lines = [repr(self), table(("layer, as it is served", "rank needed", "written", "error of ΔW"), rows)]
        if self.check is not None:
            lines += [f"check prompt {self.check.prompt}: {self.check.tokens}"]
            if not self.check.tells:
                lines += ["  the base alone generates the same: it proves nothing; give check=… with token ids"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, without the folder."""
        return {**asdict(self), "directory": None} | {"check": asdict(self.check) if self.check else None}


def check_of(report: Mapping[str, Any]) -> CheckPrompt | None:
    """The check prompt in what a folder says; None where it holds none. Raises ValueError for what is none."""
    found = report.get("check")
    if found is None:
        return None
    fields = CheckPrompt.__dataclass_fields__
    if not isinstance(found, dict) or found.keys() != set(fields):
        raise ValueError(f"its check prompt has other fields than {', '.join(fields)}")
    for key, ids in found.items():
        if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise ValueError(f"{key} of its check prompt is no list of token ids")
    return CheckPrompt(**found)
