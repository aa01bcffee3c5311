"""Run the tests as on other processors: older kernels, bitsandbytes' 4-bit packing on and off, two threads.

    uv run python tools/processors.py              in all these ways: the tests that some processor has failed before
    uv run python tools/processors.py --all        the whole suite
    uv run python tools/processors.py avx2 on      these ways alone

torch, oneDNN and MKL choose their kernels by the processor, and each can be told to take an older one's. Ways that this
machine cannot go are left out, and said. The exit status is 1 when a test fails anywhere.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What has failed on some processors only: kernels whose last digit depends on requires_grad (architectures), packing,
# and an int8 product that saturates where oneDNN is held back (twins). Nothing else has, of the whole suite.
SENSITIVE = ("test_twins", "test_architectures", "test_packing", "test_quantised", "test_four_bit", "test_dense_weight")
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")


@dataclass(frozen=True)
class Way:
    """One way to run the tests; `needs` is what torch must find on an x86 processor, "" for any machine."""

    name: str
    needs: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    packing: str = ""

    def __str__(self) -> str:
        return " ".join([*(f"{key}={value}" for key, value in self.environment.items()), *self.options()])

    def options(self) -> list[str]:
        return [f"--packing={self.packing}"] if self.packing else []


def x86(name: str, aten: str, onednn: str, mkl: str) -> Way:
    kernels = {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_CBWR": mkl}
    return Way(name, aten.upper(), kernels, "off")


WAYS = (
    x86("generic", "default", "SSE41", "COMPATIBLE"),
    x86("avx2", "avx2", "AVX2", "AVX2"),
    x86("avx512", "avx512", "AVX512_CORE", "AVX512"),
    Way("on", packing="on"),
    Way("off", packing="off"),
    Way("threads", environment={"OMP_NUM_THREADS": "2"}),
)


def missing(way: Way, machine: str, capability: str) -> str:
    """Why this machine cannot run the tests that way, or ""."""
    if not way.needs:
        return ""
    if machine.lower() not in ("x86_64", "amd64"):
        return f"kernels of x86, and this is {machine}"
    known = capability in CAPABILITIES and CAPABILITIES.index(capability) >= CAPABILITIES.index(way.needs)
    return "" if known else f"this processor has {capability}"


def counts(output: str) -> dict[str, int]:
    """Of pytest's last line: {"passed": 3, "failed": 1, …}."""
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", output.rstrip().rpartition("\n")[2])
    return {what: int(number) for number, what in found}


def run(way: Way, files: list[str]) -> bool:
    """Run pytest that way, print its row and what failed; whether all passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *way.options(), *files]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **way.environment}, capture_output=True, text=True, check=False
    )
    seen = counts(done.stdout)
    failed = seen.get("failed", 0) + seen.get("error", 0)
    numbers = f"{seen.get('passed', 0):7} {failed:7} {seen.get('skipped', 0):8} {time.monotonic() - start:8.0f}"
    names = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, flags=re.M)
    if done.returncode and not names:
        names = [done.stdout[-2000:], done.stderr[-2000:]]
    print("\n".join([f"{way.name:8}{numbers}  {way}", *names]), flush=True)
    return done.returncode == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(way.name for way in WAYS)}; all by default")
    parser.add_argument("--all", action="store_true", help="the whole suite")
    jobs = min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help="at a time (default: %(default)s)")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - {way.name for way in WAYS}:
        parser.error(f"no way {', '.join(sorted(unknown))}; there are {', '.join(way.name for way in WAYS)}")
    ask = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    capability = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    print(f"as on    passed  failed  skipped  seconds  here: {platform.machine()}, {capability}", flush=True)
    ways = [way for way in WAYS if not given.names or way.name in given.names]
    why = {way.name: missing(way, platform.machine(), capability) for way in ways}
    for name, reason in why.items():
        if reason:
            print(f"{name:8} left out: {reason}", flush=True)
    files = [] if given.all else [f"tests/{name}.py" for name in SENSITIVE]
    with ThreadPoolExecutor(given.jobs) as pool:
        passed = list(pool.map(lambda way: run(way, files), [way for way in ways if not why[way.name]]))
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
