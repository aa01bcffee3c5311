"""tools/processors.py: which ways a machine can go, and a table that cannot hide a failure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import processors
from processors import WAYS, Way, counts, missing, run


def test_kernels_are_those_the_machine_has() -> None:
    left = {
        (machine, capability): [way.name for way in WAYS if not missing(way, machine, capability)]
        for machine, capability in (
            ("x86_64", "AVX512"),
            ("AMD64", "AVX2"),
            ("x86_64", "DEFAULT"),
            ("arm64", "DEFAULT"),
        )
    }
    everywhere = ["on", "off", "threads"]
    assert list(left.values()) == [
        ["generic", "avx2", "avx512", *everywhere],
        ["generic", "avx2", *everywhere],
        ["generic", *everywhere],
        everywhere,
    ]
    assert missing(WAYS[2], "x86_64", "AVX2") == "this processor has AVX2"
    assert missing(WAYS[0], "aarch64", "SVE256") == "kernels of x86, and this is aarch64"


def test_the_last_line_is_counted() -> None:
    assert counts("1 failed\n....\n3 failed, 12 passed, 2 skipped, 1 error in 4.00s\n") == {
        "failed": 3, "passed": 12, "skipped": 2, "error": 1,
    }  # fmt: skip
    assert counts("") == {}


def test_the_files_are_there() -> None:
    assert all((processors.ROOT / f"tests/{name}.py").exists() for name in processors.SENSITIVE)


@pytest.mark.slow
def test_a_failure_and_a_crash_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests = "def test_good(): pass\ndef test_bad():\n    import os\n    assert os.environ['OMP_NUM_THREADS'] == '7'\n"
    (tmp_path / "test_it.py").write_text(tests)
    way = Way("few", environment={"OMP_NUM_THREADS": "6"})
    assert run(way, [str(tmp_path / "test_it.py")]) is False
    row, failed = capsys.readouterr().out.splitlines()
    assert row.split()[:4] == ["few", "1", "1", "0"]
    assert row.endswith("  OMP_NUM_THREADS=6")
    assert failed.startswith("FAILED ")
    assert run(Way("more", environment={"OMP_NUM_THREADS": "7"}), [str(tmp_path / "test_it.py")]) is True
    assert run(way, [str(tmp_path / "absent.py")]) is False
    assert "absent.py" in capsys.readouterr().out


def test_an_unknown_way_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        processors.main(["avx1024"])
    assert "no way avx1024; there are generic, avx2, avx512, on, off, threads" in capsys.readouterr().err
