"""The conformance kit: is a variant everything that the library promises of it?

    from lora_lite_core.testing import variant_checks

    @variant_checks(MyConfig(r=4))
    def test_mine(check):
        check()

makes one pytest test of every promise. `run_checks` gives the same as a list, `lora-lite check NAME` as a table.
"""

from __future__ import annotations

from .runner import CheckResult, run_checks, variant_checks
from .variant_under_test import CheckFailed, Subject

__all__ = ["CheckFailed", "CheckResult", "Subject", "run_checks", "variant_checks"]
