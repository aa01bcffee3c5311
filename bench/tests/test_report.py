"""The report: one page that needs nothing else, its pictures, its Markdown."""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from lora_lite_bench.comparing.results import ResultsFile, read
from lora_lite_bench.comparing.table import Row, TaskTable, tables
from lora_lite_bench.report.command import report
from lora_lite_bench.report.curves import losses, rates
from lora_lite_bench.report.pictures import forgetting, parameters, scores
from lora_lite_bench.report.style import headline, name_points, new
from lora_lite_bench.runs.costing import Costs
from lora_lite_bench.runs.methods import FROZEN, FULL
from lora_lite_bench.runs.run import Job, Result
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

METHODS = {"lora": 0.7, "ia3": 0.3, "dora": 0.72, "antipasto": 0.5, FULL: 0.6}
SPECTRUM = {f"model.layers.{n}.mlp.up_proj": {"shift": [0.1, -0.2, 0.3], "angle": [0.05 * n, 0.2]} for n in range(4)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up runs of five methods."""
    path = tmp_path_factory.mktemp("results") / "r.jsonl"
    file, rng = ResultsFile(path), random.Random(0)
    for size, (method, mean) in enumerate(METHODS.items(), 1):
        first = Job("shifted", {}, method, {}, 0, 0.01, 48, label=method)
        file.append(first, Costs(100 * size, 10.0 * size, 2.0, 3.0, 1.5, 2.5, 0.1, 20.0 + size))
        for lr, loss in ((1e-3, 3.0), (1e-2, 1.0), (1e-1, 2.0)):
            short = Job("shifted", {}, method, {}, 0, lr, 12, whole=False, label=method)
            file.append(short, Result(valid_loss=loss + size / 10, losses=[4.0, 3.0]))
        for seed in range(3):
            test = mean + rng.gauss(0, 0.02)
            curve = [4 * 0.9**n * (1 + rng.random() / 9) for n in range(48)]
            run = Result(trainable=100 * size, test=test, valid=test, valid_loss=0.9, own=0.1 * size, losses=curve)
            run.spectrum = SPECTRUM if method == "antipasto" else {}
            run.file_bytes, run.reload_error = 1000, 0.0
            file.append(Job("shifted", {}, method, {}, seed, 0.01, 48, label=method), run)
    file.append(Job("shifted", {}, FROZEN, {}, 0, 0.0, 0, label=FROZEN), Result(test=0.0, valid=0.0, own=0.99))
    return path


class Page(HTMLParser):
    """Tags that are open, what was found on the way."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.cells: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag == "img":
            self.images.append(found)
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["td"]:
            self.cells.append(data)


def test_the_page_stands_alone(results: Path, tmp_path: Path) -> None:
    page, png, text = tmp_path / "p.html", tmp_path / "png", tmp_path / "t.md"
    done = CliRunner().invoke(report, [str(results), "--html", str(page), "--png", str(png), "--markdown", str(text)])
    assert done.exit_code == 0, done.output
    written = page.read_text(encoding="utf-8")
    without_pictures = re.sub(r'"data:image/png;base64,[^"]*"', '""', written)
    assert "//" not in without_pictures.replace("<!DOCTYPE html>", ""), "no address of the web"
    assert not re.search(r"<script|<link|@import|url\(", without_pictures)
    read = Page(written)
    assert read.open == [], "every tag is closed"
    assert len(set(read.ids)) == len(read.ids)
    assert len(read.images) == 7
    assert all(image["alt"] and str(image["src"]).startswith("data:image/png;base64,iVBOR") for image in read.images)
    assert {"lora", "the reference", "dora", FULL, FROZEN} <= set(read.cells)
    names = ("scores", "parameters", "rates", "losses", "costs", "forgetting", "spectra")
    assert sorted(path.name for path in png.iterdir()) == sorted(f"shifted-{n}.png" for n in names)
    table = text.read_text(encoding="utf-8")
    assert table.count("| lora |") == 1
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_what_methods_are_called_is_text_in_the_page(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for seed in range(2):
        job = Job("shifted", {}, "lora", {}, seed, 0.01, 8, label="lora <script>alert($1)</script> $x^2$ | a")
        ResultsFile(path).append(job, Result(test=0.5, valid=0.5, own=0.5, trainable=5, losses=[2.0, 1.0]))
    page, text = tmp_path / "p.html", tmp_path / "t.md"
    done = CliRunner().invoke(report, [str(path), "--html", str(page), "--markdown", str(text)])
    assert done.exit_code == 0, done.output
    assert "<script" not in page.read_text(encoding="utf-8")
    assert "<script" not in text.read_text(encoding="utf-8")
    assert r"\| a" in text.read_text(encoding="utf-8")


def test_no_results(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").touch()
    done = CliRunner().invoke(report, [str(tmp_path / "r.jsonl")])
    assert done.exit_code == 1
    assert "no finished run in" in done.output
    assert "type: lora-lite bench" in done.output


def test_one_seed_says_nothing_of_differences(results: Path) -> None:
    """As of the protocols of gsm8k: the picture's title does not count methods as better, worse or the same."""
    records = read([results])
    title = [next(iter(tables(some))) for some in (records, [one for one in records if one.job.seed == 0])]
    said = [figure.get_suptitle().replace("\n", " ") for figure in map(scores, title)]
    assert said[0].startswith("shifted: of 3 methods ")
    assert said[1].strip() == "shifted: test scores of one seed: the differences may be chance"


def test_of_methods_that_score_the_same_none_scores_highest(results: Path) -> None:
    records = read([results])
    (said,) = [figure.get_suptitle().replace("\n", " ") for table in tables(records) if (figure := parameters(table))]
    assert "highest" in said
    for record in records:
        if isinstance(record.outcome, Result):
            record.outcome.test = 0.0
    (said,) = [figure.get_suptitle().replace("\n", " ") for table in tables(records) if (figure := parameters(table))]
    assert said.strip() == "shifted: all methods score 0.0 %"


def test_names_cover_neither_each_other_nor_points() -> None:
    """Twenty methods whose points are nearly one."""
    figure, (axes,) = new(9.5, 6.2)
    rng = random.Random(0)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    points = [(95 + rng.random(), 60 + 2 * rng.random(), Row(f"method_{n}", f"method_{n}")) for n in range(20)]
    headline(figure, "Says", "small")
    name_points(axes, points)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    assert len(boxes) == 20
    assert not [1 for n, one in enumerate(boxes) for other in boxes[:n] if Bbox.intersection(one, other)]
    room = axes.get_window_extent(renderer)
    assert all(box.x0 >= room.x0 and box.x1 <= room.x1 + 1 for box in boxes)
    at = axes.transData.transform([(x, y) for x, y, _ in points])
    assert not [1 for box in boxes for x, y in at if box.contains(x, y)]


def test_what_a_picture_says_is_text_of_the_page(results: Path, tmp_path: Path) -> None:
    """A screen as small as a phone's shows it as it shows other text."""
    page = tmp_path / "p.html"
    CliRunner().invoke(report, [str(results), "--html", str(page)])
    words = page.read_text(encoding="utf-8")
    assert "<figcaption><b>shifted: of 3 methods " in words
    assert "the best rate is 0.01 for all" in words, "not: between 0.01 and 0.01, so one would be unfair"
    assert words.count("<th>variant</th>") == 2, "scores, then costs: both fit a desktop's screen"


def _says(figure: Figure | None) -> str:
    assert figure is not None
    return " ".join(figure.get_suptitle().split())


def _shown(axis: Axis) -> list[str]:
    """The numbers in view (panels share an axis, and most leave the text out)."""
    low, high = sorted(axis.get_view_interval())
    return [axis.get_major_formatter()(at) for at in axis.get_majorticklocs() if low <= at <= high]


def test_logarithmic_axes_have_numbers(results: Path) -> None:
    """Losses of one run often lie within a decade: powers of ten alone would leave the axis bare."""
    (table,) = tables(read([results]))
    for figure in (rates(table), losses(table)):
        assert figure is not None
        FigureCanvasAgg(figure).draw()
        for axes in figure.axes[: len(METHODS)]:
            for axis in (axes.xaxis, axes.yaxis):
                assert 2 <= len(_shown(axis)) <= 9, _shown(axis)
                assert "$" not in "".join(_shown(axis))


def _of(results: Path, *methods: str) -> TaskTable:
    (table,) = tables([record for record in read([results]) if record.job.method in (*methods, FROZEN, FULL)])
    return table


def test_one_method_is_called_by_its_name(results: Path) -> None:
    figure = scores(_of(results, "lora", "ia3"))
    assert _says(figure) == "shifted: ia3 is worse than lora"


def test_anchors_are_not_called_variants(results: Path) -> None:
    figure = losses(_of(results, "lora", "ia3"))
    assert figure is not None
    assert ": half-way through, of the variants " in _says(figure)


def test_what_a_neighbouring_rate_does_not_say(results: Path) -> None:
    """A grid has two points a decade: which of two neighbours is best may be chance."""
    table = _of(results, "lora", "ia3")
    for row, lr in zip(table.rows, (0.01, 0.032, 0.032, 0.01), strict=False):
        row.main.lr = lr
    figure = rates(table)
    assert _says(figure) == "shifted: the best rates, 0.01 and 0.032, are neighbours in the grid"
    table.rows[0].main.lr = 0.32
    figure = rates(table)
    assert _says(figure).endswith("between 0.032 and 0.32, so one rate for all would be unfair")


def test_how_much_of_the_own_task_there_was(results: Path) -> None:
    table = _of(results, "lora", "ia3")
    for row in table.rows:
        row.forgets = 0.98
    figure = forgetting(table)
    assert _says(figure) == (
        "shifted: whatever learns it forgets the base's own task, on which the frozen model scores 99 %"
    )
