"""Test a launch script on the CPU: it trains, resumes, saves on a signal and returns the run's exit code."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.launching import SCRIPTS, alone, launch
from tests.training_runs import REPOSITORY, SMALL, records, wait_until

FLAGS = [*SMALL, *"--split 90,10,0 --eval-iters 0 --save-interval 2".split()]
RUN = """
import sys
from pathlib import Path
from tools.recipes.process import run_training
sys.exit(run_training(sys.argv[2:], Path(sys.argv[1])))
"""
LATE = """
import subprocess, sys, time
time.sleep(2)
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""
ENDS = "import signal, time; signal.signal(15, signal.SIG_DFL); time.sleep(600)"
FAILS = ENDS.replace("signal.SIG_DFL", "lambda *_: exit('x.py: error: No space left')")
TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 --no-python"
ERROR = "x.py: error: --split: wrong.\nGive another"


@pytest.mark.parametrize(("ending", "code", "repeated"), [
    ("exit 3", 3, ""),
    ("kill -KILL $$", 137, ""),
    (f"echo '{ERROR}'; echo 'E1127 12:00 exitcode: 2'; exit 2", 2, ERROR),
    (f"exec {TORCHRUN} python -c 'import sys; sys.exit(17)'", 17, ""),
    (f"exec {TORCHRUN} bash -c 'kill -KILL $BASHPID'", 137, ""),
])  # fmt: skip
def test_ends_with_the_trainings_exit_code_its_whole_log_and_its_last_error(ending, code, repeated, tmp_path) -> None:
    log = tmp_path / "log"
    log.write_text("x.py: error: of an earlier start\n")
    words = ["bash", "-c", f"echo out; echo err >&2; {ending}"]
    result = subprocess.run([sys.executable, "-c", RUN, log, *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == code and result.stdout.startswith("out\nerr\n")
    assert result.stderr.strip() == repeated
    assert log.read_text() == f"x.py: error: of an earlier start\n{result.stdout}"


def test_a_second_run_leaves_the_log_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = [sys.executable, "-c", RUN, str(log), "bash", "-c", 'echo out; read -r < "$0"', str(tmp_path / "pipe")]
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as first:
        wait_until(lambda: log.exists() and log.read_text() == "out\n", first)
        second = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
        assert second.returncode and second.stdout == "" and f"OUTPUT_DIR={tmp_path}" in second.stderr
        (tmp_path / "pipe").write_text("end\n")
        assert first.communicate(timeout=60)[0] == log.read_text() == "out\n"
    assert first.returncode == 0


@pytest.mark.parametrize(
    ("training", "number", "code", "stopped"),
    [(ENDS, signal.SIGTERM, 143, True), (ENDS, signal.SIGHUP, 143, True), (FAILS, signal.SIGTERM, 1, False)],
)
def test_a_signal_before_torchrun_has_children_is_not_lost(training, number: int, code: int, stopped, tmp_path) -> None:
    """`run_training` waits until a child handles the signal, without ps or pgrep. A run that cannot save has failed."""
    (tmp_path / "tee").symlink_to(shutil.which("tee") or "")
    words = [sys.executable, "-c", RUN, str(tmp_path / "log"), sys.executable, "-c", LATE, training]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=os.environ | {"PATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    wait_until((tmp_path / "log").exists)  # tee creates the log, after the launcher has started
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code and output.splitlines()[0].startswith("Stopping")
    assert ("Stopped before the first checkpoint" in output) == stopped


def test_trains_saves_at_sigterm_and_resumes(data: Path, tmp_path: Path) -> None:
    """SIGTERM reaches only the script, as with kill and docker stop. Paths have blanks and umlauts."""
    folder = tmp_path / "dätä of mine"
    folder.mkdir()
    for suffix in (".bin", ".idx"):
        (folder / f"a_document{suffix}").symlink_to(data.with_suffix(suffix))
    environment = {"DATA_DIR": str(folder), "OUTPUT_DIR": str(folder / "run"), "PYTHON": sys.executable}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    words, log, console = ["1", "100000", "2", "--", *FLAGS], folder / "run" / "train.log", tmp_path / "console"
    process = subprocess.Popen(
        ["bash", str(SCRIPTS / "train_llama_182m_remoe.sh"), *words],
        stdout=console.open("w"),  # a pipe that nobody reads would fill and stop the training
        stderr=subprocess.STDOUT,
        env=alone(environment),
    )
    # Wait for the first save: the processes that it starts must survive the signal too.
    wait_until(lambda: log.exists() and "successfully saved checkpoint" in log.read_text(), process)
    process.terminate()
    process.wait(timeout=60)
    output = console.read_text()
    assert process.returncode == 143, output
    saved = int((folder / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert f"continues from iteration {saved};" in output.splitlines()[-1]
    assert saved in (last := max(records(log.read_text())), last + 1)
    assert "exiting program after receiving SIGTERM" in log.read_text()

    result = launch("182m_remoe", *words, "--exit-interval", "1", **environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert list(records(result.stdout)) == [saved + 1]
    files = {path.name for path in (folder / "run").iterdir()}
    assert files == {"cache", "checkpoints", "tensorboard", "train.log"}
