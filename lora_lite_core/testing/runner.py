"""Running the checks: in pytest, as a list, and (from the command line) as a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..contract.config import AdapterConfig
from ..contract.errors import ConfigError, did_you_mean

# Each module lists its checks, in this order.
from . import attach_checks as start, forward_checks as running, training_checks as training  # noqa: F401  # isort: skip  # pyright: ignore[reportUnusedImport]
from . import file_checks as keeping, kind_checks as kinds, several_checks as several  # noqa: F401  # isort: skip  # pyright: ignore[reportUnusedImport]
from .check import CHECKS, Check
from .variant_under_test import CheckFailed, Subject


@dataclass(frozen=True)
class CheckResult:
    """One line of `run_checks`: outcome is "passed", "failed", "expected failure" or "unexpectedly passed"."""

    name: str
    outcome: str
    seconds: float
    promise: str
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.outcome in ("passed", "expected failure")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def variant_checks(
    cfg: AdapterConfig,
    *,
    expected_failures: Mapping[str, str] | None = None,
    calibration: Iterable[Any] | None = None,
    identity_tol: float | None = None,
    sizes: tuple[int, int] = (64, 96),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a pytest function with one argument `check`: it runs once a promise, with the promise's name as id.

    cfg                the variant's config; a small rank keeps it fast. Its targeting is left aside
    expected_failures  name of a check: reason. Such a test must fail (strict)
    calibration        batches for the kit's model, (…, sizes[0]); None makes some up where the variant needs them
    identity_tol       largest deviation of a fresh adapter in float32; None is the variant's IDENTITY_ATOL
    sizes              widths (d, h) of the kit's layers: d → h, h → d, d → d

    Raises ConfigError when expected_failures names a check that does not exist.
    """
    import pytest

    expected = _known(expected_failures)
    subject = Subject(cfg, calibration=calibration, identity_tol=identity_tol, sizes=sizes)
    cases = [
        pytest.param(
            _bound(check, subject),
            id=name,
            marks=[pytest.mark.xfail(reason=expected[name], strict=True, raises=CheckFailed)]
            if name in expected
            else [],
        )
        for name, check in CHECKS.items()
    ]
    return pytest.mark.parametrize("check", cases)


def run_checks(
    cfg: AdapterConfig,
    *,
    expected_failures: Mapping[str, str] | None = None,
    calibration: Iterable[Any] | None = None,
    identity_tol: float | None = None,
    sizes: tuple[int, int] = (64, 96),
    only: Iterable[str] = (),
) -> list[CheckResult]:
    """Run all checks (or those named in `only`) and report each. Arguments as for `variant_checks`."""
    expected, chosen = _known(expected_failures), list(_known(dict.fromkeys(only, "")))
    subject = Subject(cfg, calibration=calibration, identity_tol=identity_tol, sizes=sizes)
    results = []
    for check in [CHECKS[name] for name in chosen] or CHECKS.values():
        began, message = time.perf_counter(), ""
        try:
            check(subject)
        except CheckFailed as error:
            message = str(error)
        fails = {True: "expected failure", False: "failed"}
        passes = {True: "unexpectedly passed", False: "passed"}
        outcome = (fails if message else passes)[check.name in expected]
        results.append(CheckResult(check.name, outcome, time.perf_counter() - began, check.promise, message))
        if not subject.attaches and not chosen:
            break  # the others would all say so
    return results


def tensors_of(cfg: AdapterConfig) -> list[str]:
    """What the variant puts on a layer 64 → 96, a line a tensor; raises what `attach` raises."""
    subject = Subject(cfg)
    adapter = subject.attach(subject.model())
    target = next(iter(adapter.layers().values()))
    lines = [f"on a layer {target.d_in} → {target.d_out}:"]
    for bare, tensor in target.params.items():
        saved = target.shared[bare].key if bare in target.shared else bare in target.saved
        kind = "trained" if tensor.requires_grad else "frozen" if saved else "frozen, not saved"
        kind += ", shared by layers" if bare in target.shared else ""
        lines.append(f"  {bare} {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}, {kind}")
    return lines


def _bound(check: Check, subject: Subject) -> Callable[[], None]:
    def run() -> None:
        __tracebackhide__ = True
        check(subject)

    run.__doc__ = check.promise
    return run


def _known(names: Mapping[str, str] | None) -> dict[str, str]:
    for name in names or ():
        if name not in CHECKS:
            raise ConfigError(f"no check is called '{name}'{did_you_mean(name, CHECKS)}\n  checks: {', '.join(CHECKS)}")
    return dict(names or {})
