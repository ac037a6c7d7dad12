"""Test the report of a tiny run: the figures on the page, its look in a browser, and errors."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, sync_playwright

from tests.tiny_model import RELU
from tests.training_runs import TINY, run
from tools.report.command import main
from tools.runs.figure_reader import read_figures

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCREENS = [(1366, 768, False, "light"), (390, 844, True, "dark")]  # a laptop and a phone: width, height, touch, colors


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny ReMoE; return its folder with the log."""
    folder = tmp_path_factory.mktemp("runs") / "remoe"
    words = [*TINY, *RELU, "--data-path", str(data), "--save", str(folder / "checkpoints"), "--save-interval", "8"]
    words += "--eval-interval 4 --eval-iters 1".split()
    run(words)
    return folder


@pytest.fixture(scope="module")
def other(trained: Path) -> Path:
    """Return a copy of the run without the experts' loads."""
    folder = trained.parent / "older"
    folder.mkdir()
    lines = (trained / "checkpoints" / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines.replace("tokens_per_expert", "other_figure"))
    return folder


@pytest.fixture(scope="module")
def page(trained: Path, other: Path) -> Path:
    """Write the report of both runs and return its path."""
    assert main([str(trained), str(other)]) == 0
    return trained / "report.html"


def test_the_page_shows_the_logged_figures(page: Path, trained: Path) -> None:
    text = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", text, re.DOTALL)]
    rows = {row[0]: row[1:] for row in cells if row}
    assert rows["last iteration"] == ["8", "8"] and "time left" not in rows
    sparsity = read_figures(trained).newest("sparsity")
    assert rows["sparsity S"] == [f"{sparsity:.4f}"] * 2
    stages = [row for row in cells if row[:1] == ["remoe"] and {*row[1:2]} & {"dense", "on the way", "steady"}]
    assert stages and all(row[4].startswith("0:0") and float(row[5]) > 0 for row in stages)
    for title in ("Training", "Validation", "Throughput", "Experts per token", "λ", "remoe"):
        assert f"<h3>{title}</h3>" in text
    assert page.stat().st_size < 3e6


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start a browser; without one skip the test, or fail it if REQUIRE_BROWSER is set."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing = f"needs a browser, one of {', '.join(BROWSERS)}: apt-get install chromium"
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(missing)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])


@pytest.mark.parametrize(("width", "height", "touch", "scheme"), SCREENS)
def test_looks_right_in_a_browser(page: Path, browser, width: int, height: int, touch: bool, scheme: str) -> None:
    wrong: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            wrong.append(message.text)

    screen = {"viewport": {"width": width, "height": height}, "is_mobile": touch, "has_touch": touch}
    with browser.new_context(offline=True, color_scheme=scheme, **screen) as context:
        tab = context.new_page()
        tab.on("console", listen)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
        tab.goto(page.as_uri())
        tab.wait_for_function("Bokeh.documents.length && Bokeh.documents.every(document => document.is_idle)")
        assert tab.evaluate("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
        zoomed_by_dragging = tab.evaluate("figures().map(figure => figure.toolbar.gestures.pan.active != null)")
        assert len(zoomed_by_dragging) > 8 and set(zoomed_by_dragging) == {not touch}
        shown = "figures()[0].renderers.filter(glyphs => glyphs.visible && glyphs.name).length"
        before = tab.evaluate(shown)
        tab.get_by_label("older").uncheck()
        assert tab.evaluate(shown) == before / 2
        assert tab.locator("[data-only=older]").count() == 0
        tab.get_by_label("remoe").uncheck()
        assert tab.locator("[data-only=remoe]").is_hidden()
    assert wrong == []


def test_a_run_in_progress(trained: Path, tmp_path: Path) -> None:
    lines = (trained / "checkpoints" / "metrics.jsonl").read_text().splitlines(keepends=True)
    early = next(place for place, line in enumerate(lines) if json.loads(line).get("iteration") == 6)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:early]))
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<td>last iteration</td><td>5</td>" in page and "time left" in page


def test_wrong_files_are_named(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.md").write_text("Nothing of a run.\n")
    (tmp_path / "other.jsonl").write_text('{"kind": "log"}\n')
    (tmp_path / "folder").mkdir()
    output = ["--output", str(tmp_path / "folder")]
    for words, code in (
        ([tmp_path / "folder"], "REMOE-E502"),
        ([tmp_path / "notes.md"], "REMOE-E502"),
        ([tmp_path / "other.jsonl"], "REMOE-E502"),
        ([trained, *output], "REMOE-E300"),
    ):
        assert main([*map(str, words)]) == 1
        error = capsys.readouterr().err
        assert str(words[-1]) in error and code in error
    assert not (tmp_path / "report.html").exists()
    assert main([str(trained), "--output", str(tmp_path / "new" / "page.html")]) == 0
