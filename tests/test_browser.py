"""The site and the report in a real browser, headless Chromium out of an npm package: nothing is fetched, nothing fails,
nothing is wider than the screen, on a desktop and on a phone, light and dark. Needs node and 63 MB of a registry."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
UNPACK = """
const zlib = require("zlib"), fs = require("fs");
for (const file of fs.readdirSync("package/bin"))
  fs.writeFileSync(file.replace(".br", ""), zlib.brotliDecompressSync(fs.readFileSync("package/bin/" + file)));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")

    def run(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    run("npm", "install", "--no-audit", "--no-fund", "puppeteer-core@22")
    run("npm", "pack", "@sparticuz/chromium@123.0.1")
    with tarfile.open(next(folder.glob("*.tgz"))) as packed:
        packed.extractall(folder, filter="data")
    run("node", "-e", UNPACK)
    for name in ("al2", "al2023", "swiftshader"):
        if (folder / f"{name}.tar").exists():
            with tarfile.open(folder / f"{name}.tar") as packed:
                packed.extractall(folder, filter="data")
    (folder / "chromium").chmod(0o755)
    shutil.copy(ROOT / "tests/browser.js", folder)
    return folder


def looked_at(browser: Path, pages: list[Path]) -> list[dict[str, Any]]:
    libraries = f"{browser / 'lib'}:{browser}"
    command = ["node", "browser.js", str(browser / "chromium"), libraries, str(browser), *map(str, pages)]
    done = subprocess.run(command, cwd=browser, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def bright(colour: str) -> float:
    if colour == "rgba(0, 0, 0, 0)":
        return 1.0  # the page's own white
    red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
    return (red + green + blue) / 765


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_pages_in_a_browser(browser: Path, tmp_path: Path) -> None:
    built = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path / "site")]
    subprocess.run(built, check=True, capture_output=True)
    quick = [
        sys.executable,
        "-m",
        "lora_lite_core",
        "bench",
        "lora",
        "ia3",
        "--quick",
        "--out",
        str(tmp_path / "r.jsonl"),
    ]
    subprocess.run(quick, check=True, capture_output=True)
    pages = [tmp_path / "site" / f"{name}.html" for name in ("index", "catalogue", "methods", "results")]
    found = looked_at(browser, [*pages, tmp_path / "r.html"])
    assert len(found) == 4 * 5
    for seen in found:
        where = f"{seen['page']} at {seen['width']}, {seen['scheme']}"
        assert not seen["asked"], where
        assert not seen["said"], where
        assert seen["wide"] <= seen["width"], where
        assert all(seen["pictures"]), where
        assert abs(bright(seen["background"]) - bright(seen["ink"])) > 0.5, (where, seen["background"], seen["ink"])
    catalogue = next(seen for seen in found if seen["page"].endswith("catalogue.html"))
    assert catalogue["left"] == ["hra"]
    assert next(seen for seen in found if seen["page"].endswith("methods.html"))["formulas"] > 70
