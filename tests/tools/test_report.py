"""The report of a tiny training: what is read, what the page tells, and how it looks in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bokeh.models import Scatter
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.tools.sweeping import evaluated, logged
from tests.trainings import REPOSITORY, TINY, finish, run
from tools.common import short_names
from tools.common.tiny_model import RELU
from tools.evaluate.command import main as evaluate
from tools.report.command import main
from tools.report.costs import LATER, count_flops, stages_of
from tools.report.figures import panels, thin
from tools.report.reading import Run, read_run
from tools.report.tables import differences, summary
from tools.sweep.stages import Flops

pytestmark = [pytest.mark.usefixtures("one_thread", "process_groups"), pytest.mark.filterwarnings("ignore")]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Of a laptop and of a phone.
SCREENS = [(1366, 768, False), (390, 844, True)]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny ReMoE's run with its log and an evaluation of its checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "remoe"
    words = [*TINY, *RELU, "--data-path", str(data), "--save", str(folder / "checkpoints"), "--save-interval", "8"]
    words += "--eval-interval 4 --eval-iters 1 --moe-log-flips-interval 2 --moe-per-layer-logging".split()
    words += ["--tensorboard-dir", str(folder / "tensorboard"), "--tensorboard-log-interval", "1"]
    output = run([*words, "--log-timers-to-tensorboard"])
    (folder / "train.log").write_text(output)
    text = ["--data-path", str(data), "--sequences", "2", "--output", str(folder / "held-out.json")]
    assert evaluate(["--load", str(folder / "checkpoints"), *text]) == 0
    return folder


@pytest.fixture(scope="module")
def other(trained: Path) -> Path:
    """The same run without metrics.jsonl, as of a training with an older version, and with another learning rate."""
    folder = trained.parent / "older"
    folder.mkdir()
    log = (trained / "train.log").read_text()
    (folder / "train.log").write_text(re.sub(r"(  lr \.+ )\S+", r"\g<1>0.125", log))
    shutil.copytree(trained / "tensorboard", folder / "tensorboard")
    return folder


@pytest.fixture(scope="module")
def page(trained: Path, other: Path) -> Path:
    """The report of both."""
    assert main([str(trained), str(other)]) == 0
    return trained / "report.html"


def test_all_files_of_a_run_tell_the_same(trained: Path, other: Path) -> None:
    metrics, printed = read_run(trained, "metrics"), read_run(other, "printed")
    assert list(metrics.rows) == list(printed.rows) == list(range(1, 9))
    for key in ("lm_loss", "learning_rate", "grad_norm", "sparsity", "l1_coefficient", "tokens_per_second"):
        iterations, values = metrics.series(key)
        assert len(iterations) == 8 and printed.series(key)[1] == pytest.approx(values, rel=1e-3), key
    for row in metrics.rows.values():
        assert sum(row["layer_l1_loss"].values()) == pytest.approx(row["l1_loss"], rel=1e-5)
    for key in ("layer_sparsity", "layer_l1_loss", "tokens_per_expert"):
        of_layers = metrics.layers(key)
        assert list(of_layers) == [1, 2]
        for layer, (iterations, values) in printed.layers(key).items():
            assert iterations == of_layers[layer][0]
            for value, expected in zip(values, of_layers[layer][1], strict=True):
                assert value == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert metrics.validation == printed.validation and list(metrics.validation[""]) == [4, 8]
    assert metrics.newest_validation == printed.newest_validation
    assert list(metrics.flips) == [2, 4, 6, 8] and metrics.done and printed.done
    assert metrics.target == printed.target == 0.875
    of_the_fork = {name: value for name, value in printed.args.items() if name not in LATER}
    assert count_flops(metrics.args) == count_flops(printed.args) == count_flops(of_the_fork)


def test_reads_a_half_written_line_as_none(trained: Path, tmp_path: Path) -> None:
    lines = (trained / "checkpoints" / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines + lines.splitlines()[-1][:40])
    assert read_run(tmp_path, "run").rows == read_run(trained, "run").rows


def test_reads_a_log_of_the_authors_fork(tmp_path: Path) -> None:
    arguments = {"train_iters": 30, "seq_length": 64, "global_batch_size": 4, "num_experts": 4, "moe_router_topk": 1}
    arguments |= {"moe_granularity": 2, "ffn_hidden_size": 64, "moe_ffn_hidden_size": None}
    log = "".join(f"  {name} {'.' * 10} {value}\n" for name, value in arguments.items())
    for place, s in enumerate((0.5, 0.7, 0.8745), start=1):
        log += logged(10 * place, 30, f" moe relu sparsity: {s} | moe relu l1 reg coeff: 1.2000E-08 |")
    (tmp_path / "fork.log").write_text(log + evaluated(30, " on validation set", 4.5))
    found = read_run(tmp_path / "fork.log", "fork")
    assert (found.num_experts, found.topk, found.target, found.settled) == (8, 2, 0.75, None)
    assert found.validation == {"": {30: 4.5}} and found.series("sparsity") == ([10, 20, 30], [0.5, 0.7, 0.8745])
    assert main([str(tmp_path / "fork.log")]) == 0
    assert "FLOPs are not counted" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("more", ["", " moe relu sparsity: 0.5 | moe relu l1 reg coeff: 1.2000E-08 |"])
def test_a_log_without_its_arguments_tells_no_tokens(more: str, tmp_path: Path) -> None:
    """Of this project, and of the authors' fork."""
    (tmp_path / "end.log").write_text(logged(10, 30, more))
    assert main([str(tmp_path / "end.log")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<td>iteration</td><td>10</td>" in page and "<td>tokens</td>" not in page


def test_the_page_tells_what_the_files_do(page: Path, trained: Path, data: Path) -> None:
    text = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", text, re.DOTALL)]
    rows = {row[0]: row[1:] for row in cells if row}
    assert rows["iteration"] == ["8 of 8", "8 of 8"] and "time left" not in rows
    last = read_run(trained, "remoe").rows[8]
    assert rows["sparsity S"] == [f"{last['sparsity']:.4f}"] * 2 and rows["guarded layers"] == ["none", "none"]
    assert rows["--lr"] == ["0.004", "0.125"] and "--save" not in rows
    held_out = json.loads((trained / "held-out.json").read_text())["text"]
    ((_, bounds),) = next(iter(held_out.values())).items()
    assert rows["remoe"][:3] == [data.name, "none", f"{bounds['none']['loss']:.5f}"]
    stages = [row for row in cells if {*row[1:2]} & {"dense", "on the way", "steady"}]
    assert {row[0] for row in stages} == {"remoe", "older"} and all(float(row[5]) > 0 for row in stages)
    for title in ("Training", "Validation", "Throughput", "Experts per token", "λ", "Flips", "remoe", "older"):
        assert f"<h3>{title}</h3>" in text
    assert page.stat().st_size < 3e6


def write_metrics(folder: Path, args: dict[str, object], *records: dict[str, object]) -> Path:
    """A metrics.jsonl of a start with these arguments and of these records."""
    folder.mkdir(exist_ok=True)
    start = {"kind": "start", "time": 0.0, "iteration": 0, "args": args}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (start, *records)))
    return folder


@pytest.mark.parametrize("target", [None, 0.75])
def test_a_batch_that_grows(target: float | None, tmp_path: Path) -> None:
    """FLOPs and tokens are those of each line's own sequences, not of the batch that the last start was given."""
    args = {"global_batch_size": 16, "seq_length": 10, "num_experts": 8, "moe_router_topk": 2}
    routing = {} if target is None else {"sparsity": target, "target_sparsity": target}
    of_steps = {10: 4, 20: 8, 30: 16}
    line = {"kind": "log", "seconds_per_iteration": 2.0, **routing}
    rows = [line | {"iteration": at, "global_batch_size": batch} for at, batch in of_steps.items()]
    run = read_run(write_metrics(tmp_path / "run", args, *rows), "run")
    assert run.series("tokens_per_second")[1] == [20.0, 40.0, 80.0]
    found = stages_of(run, Flops(100.0, 10.0))
    assert sum(stage.flops for stage in found) == pytest.approx(100.0 * 10 * (4 + 8 + 16))
    assert sum(stage.hours for stage in found) == pytest.approx(30 * 2.0 / 3600)
    log = "".join(logged(at, 30).replace("size:     4", f"size: {batch}") for at, batch in of_steps.items())
    (tmp_path / "run.log").write_text("  seq_length ......... 10\n  global_batch_size ........ 16\n" + log)
    assert read_run(tmp_path / "run.log", "printed").series("tokens_per_second")[1] == [400.0, 800.0, 1600.0]


def test_of_two_evaluations_at_an_iteration_the_curve_has_the_first(tmp_path: Path) -> None:
    """The second is that of the training's end, which the table has."""
    held_out = [{"kind": "validation", "iteration": at, "lm_loss": loss} for at, loss in ((4, 3.0), (8, 2.5), (8, 2.0))]
    metrics = read_run(write_metrics(tmp_path / "run", {}, *held_out), "run")
    losses = ((4, "", 3.0), (8, "", 2.5), (8, " on validation set", 2.0))
    (tmp_path / "run.log").write_text(logged(8, 8) + "".join(evaluated(*loss) for loss in losses))
    printed = read_run(tmp_path / "run.log", "run")
    for found in (metrics, printed):
        assert found.validation == {"": {4: 3.0, 8: 2.5}}
        assert ["validation loss", "2.0000 at 8"] in summary([found]).rows


def test_what_differs_are_flags(tmp_path: Path) -> None:
    noted = "iteration curr_iteration consumed_train_samples num_floating_point_operations_so_far encoder_num_layers"
    runs = [
        read_run(write_metrics(tmp_path / str(n), dict.fromkeys([*noted.split(), "lr", "_explicit"], n)), str(n))
        for n in (1, 2)
    ]
    assert differences(runs).rows == [["--lr", "1", "2"]]


@pytest.mark.parametrize("content", ['{"a": 1}', "[1, 2]", '{"kind": "log"}'])
def test_names_a_file_of_something_else(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jsonl").write_text(f"{content}\n")
    assert main([str(tmp_path / "text.jsonl")]) == 1
    assert "text.jsonl: is no log of a run: line 1 has no kind and iteration. Give a" in capsys.readouterr().err


def test_old_starts_without_their_arguments(tmp_path: Path) -> None:
    folder = write_metrics(tmp_path, {"lr": 1}, {"kind": "start", "iteration": 2})
    assert read_run(folder, "run").args == {"lr": 1}


def browser_path() -> str:
    """A browser's; where there is none the test is skipped, or fails if REQUIRE_BROWSER is set."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing = f"needs a browser, one of {', '.join(BROWSERS)}: apt-get install chromium"
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(missing)
    return path


def test_a_browser_can_be_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="needs a browser, one of chromium"):
        browser_path()
    monkeypatch.setenv("REQUIRE_BROWSER", "")
    with pytest.raises(pytest.skip.Exception):
        browser_path()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = browser_path()
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height", "touch"), SCREENS)
def test_looks_right_in_a_browser(
    page: Path, browser: Browser, width: int, height: int, touch: bool, scheme: str
) -> None:
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
        assert (lightness(tab) > 128) == (scheme == "light")
        zoomed_by_dragging = tab.evaluate("figures().map(figure => figure.toolbar.gestures.pan.active != null)")
        assert len(zoomed_by_dragging) > 8 and set(zoomed_by_dragging) == {not touch}
        shown = "figures()[0].renderers.filter(glyphs => glyphs.visible).length"
        before = tab.evaluate(shown)
        tab.get_by_label("older").uncheck()
        assert tab.evaluate(shown) == before / 2 and tab.locator("[data-only=older]").is_hidden()
    assert wrong == []


def lightness(tab: Page) -> float:
    """Of a figure's first pixel: 0 to 255."""
    paint = """() => {
        const layers = document.querySelector("[data-root-id]").firstElementChild.shadowRoot;
        const canvas = [...function* all(root) {
            for (const element of root.querySelectorAll("*")) {
                if (element.matches("canvas")) yield element;
                if (element.shadowRoot) yield* all(element.shadowRoot);
            }
        }(layers)][0];
        return canvas.getContext("2d").getImageData(0, 0, 1, 1).data[0];
    }"""
    return tab.evaluate(paint)


def test_watches_until_the_run_is_done(trained: Path, tmp_path: Path) -> None:
    lines = (trained / "checkpoints" / "metrics.jsonl").read_text().splitlines(keepends=True)
    early = next(place for place, line in enumerate(lines) if json.loads(line).get("iteration") == 6)
    metrics, page = tmp_path / "metrics.jsonl", tmp_path / "report.html"
    metrics.write_text("".join(lines[:early]))
    command = [sys.executable, str(REPOSITORY / "tools" / "report"), str(tmp_path), "--watch", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not page.exists() and process.poll() is None:
        time.sleep(0.2)
    first = page.read_text()
    assert 'http-equiv="refresh" content="1"' in first and "<td>5 of 8</td>" in first and "time left" in first
    metrics.write_text("".join(lines))
    finish(process, 0)
    assert "http-equiv" not in page.read_text() and "<td>8 of 8</td>" in page.read_text()
    assert not list(tmp_path.glob("*.new*"))


def test_names_what_was_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}: no run: none of metrics.jsonl, checkpoints/metrics.jsonl, train.log, tensorboard/" in error
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--watch", "0"])


def test_short_names() -> None:
    assert short_names.of_models([Path("/a/dense"), Path("/a/remoe/checkpoints")]) == ["dense", "remoe"]
    assert short_names.of_models([Path("/a/remoe"), Path("/b/remoe")]) == ["/a/remoe", "/b/remoe"]
    assert short_names.of_data_sets(["a/code_text_document", "a/docs"]) == ["code", "docs"]


def test_a_long_curve_keeps_its_spikes() -> None:
    iterations, values = list(range(10_000)), [1.0] * 10_000
    values[5_432], values[7_777] = 9.0, 0.0
    thinned = thin((iterations, values), 100)
    assert len(thinned[0]) <= 100 and (5_432, 9.0) in zip(*thinned, strict=True)
    assert min(thinned[1]) == 0.0 and list(thinned[0]) == sorted(thinned[0])


def test_the_mark_of_the_settled_sparsity_is_seen() -> None:
    """On light and dark, on the curve of its colour."""
    rows = {at: {"sparsity": s, "target_sparsity": 0.75} for at, s in ((1, 0.5), (2, 0.749), (3, 0.75))}
    sparsity = next(panel for panel in panels([Run("run", rows=rows)])["Routing"] if panel.title == "Sparsity S")
    (mark,) = (drawn.glyph for drawn in sparsity.plot.renderers if isinstance(drawn.glyph, Scatter))
    assert mark.line_color == "#888888" and mark.size > 9


def test_a_run_that_has_not_logged_yet(tmp_path: Path, trained: Path) -> None:
    start = (trained / "checkpoints" / "metrics.jsonl").read_text().splitlines()[0]
    (tmp_path / "metrics.jsonl").write_text(start + "\n")
    assert main([str(tmp_path)]) == 0
    assert "<td>0 of 8</td>" in (tmp_path / "report.html").read_text()
    assert Run("nothing").target is None and not Run("nothing").done
    told = {"train_iters": 25, "log_interval": 10}
    assert Run("last line", told, {20: {}}).done and not Run("one is to come", told, {10: {}}).done
