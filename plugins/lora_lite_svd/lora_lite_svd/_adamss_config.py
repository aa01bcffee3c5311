"""Fields of AdaMSS's config of which a person who does not leave groups out needs none."""

from __future__ import annotations

from dataclasses import dataclass

from lora_lite_core import ConfigError, RankConfig


def not_whole(cfg: object, *names: str) -> str:
    """Which of the fields is no whole number of at least 1, as the rest of a message; "" where all are."""
    wrong = [name for name in names if type(value := getattr(cfg, name)) is not int or value < 1]
    return f"{wrong[0]}={getattr(cfg, wrong[0])!r}): it is a whole number of at least 1" if wrong else ""


@dataclass(frozen=True, kw_only=True)
class AllocationConfig(RankConfig):
    """A config with groups of which some are left out in training.

    target        how many groups of all layers are trained at the end; None is all
    begin, end    steps between which groups are left out
    interval      steps from one choice to the next
    beta1, beta2  how much of the mean of importances, and of uncertainties, stays at a step
    power         of the curve from all groups to target: 1 is a straight line
    """

    target: int | None = None
    begin: int = 50
    end: int = 1000
    interval: int = 100
    beta1: float = 0.85
    beta2: float = 0.85
    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if problem := self.problem():
            raise ConfigError(f"{type(self).__name__}({problem}")

    def problem(self) -> str:
        """What makes no sense in the fields, as the rest of a message; "" where nothing does."""
        if why := not_whole(self, "interval") or (self.target is not None and not_whole(self, "target")):
            return why
        if not 0 <= self.begin < self.end:
            return f"begin={self.begin!r}, end={self.end!r}): groups are left out from the first step to the second"
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                return f"{name}={getattr(self, name)!r}): the share of the old mean is between 0 and 1"
        return "" if self.power > 0 else f"power={self.power!r}): the power of the schedule is a number above 0"
