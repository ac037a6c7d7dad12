"""Test the Slurm job file with stubs of Slurm's three commands; test_slurm_cluster.py trains on a real Slurm.

They behave as observed with Slurm 24.11: `scancel --signal` reaches all processes of a step, including data loaders,
but not the job file's shell; srun, on SIGTERM, kills its tasks; `scontrol requeue` also requeues canceled jobs.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.launching import alone
from tests.training_runs import REPOSITORY, popen, wait_until

JOB_FILE = REPOSITORY / "scripts" / "slurm" / "train.sbatch"
SLURM = """#!{python}
import json, os, signal, subprocess, sys
from pathlib import Path
import psutil

folder = Path(__file__).parent

def signal_step(number):
    for process in psutil.Process(int((folder / "srun.pid").read_text())).children(recursive=True):
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass

def kill_step(*_):
    signal_step(signal.SIGKILL)
    sys.exit(137)

match [Path(sys.argv[0]).name, *sys.argv[1:]]:
    case ["srun", *arguments]:
        signal.signal(signal.SIGTERM, kill_step)
        (folder / "srun.pid").write_text(str(os.getpid()))
        (folder / "srun.json").write_text(json.dumps([arguments, dict(os.environ)]))
        task = subprocess.Popen(arguments[arguments.index("bash"):])
        sys.exit(task.wait())
    case ["scancel", "--signal=TERM", "4321"]:
        signal_step(signal.SIGTERM)
    case ["scontrol", "show", "hostnames", "node[7-8]"]:
        print("node7\\nnode8")
    case ["scontrol", "--oneliner", "show", "job", "4321"]:
        print("JobId=4321 JobName=remoe", (folder / "state").read_text(), "Reason=None Requeue=1")
    case ["scontrol", "requeue", "4321"]:
        with (folder / "requeued").open("a") as file:
            file.write("4321\\n")
        (folder / "state").write_text("JobState=PENDING")
        os.kill(os.getppid(), signal.SIGTERM)
    case unknown:
        sys.exit(f"unexpected: {{unknown}}")
"""


class Job:
    """A Slurm job: it runs Slurm's copy of the job file in the folder where sbatch was called."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.commands, self.submit = folder / "commands", folder / "submit"
        for path in (self.commands, self.submit):
            path.mkdir()
        self.file = Path(shutil.copy(JOB_FILE, self.commands / "slurm_script"))
        for name in ("srun", "scontrol", "scancel"):
            (self.commands / name).write_text(SLURM.format(python=sys.executable))
            (self.commands / name).chmod(0o755)
        slurm = {"ID": "4321", "NODELIST": "node[7-8]"}
        self.environment = alone(environment | {f"SLURM_JOB_{name}": value for name, value in slurm.items()})
        self.environment["SLURM_SUBMIT_DIR"] = str(self.submit)
        self.environment["PATH"] = f"{self.commands}:{self.environment['PATH']}"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        (self.commands / "state").write_text("JobState=RUNNING")
        return popen(["bash", str(self.file), *arguments], env=self.environment, cwd=self.submit)

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    @property
    def requeued(self) -> int:
        path = self.commands / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def script(self, text: str) -> str:
        (self.submit / "train.sh").write_text(text)
        return "train.sh"


@pytest.mark.parametrize("image", ["", "registry.example.com#remoe:0.1.0"])
def test_script_gets_its_arguments_and_the_first_nodes_address(image: str, tmp_path: Path) -> None:
    job = Job(tmp_path, DATA_DIR="/pile with spaces", CONTAINER_IMAGE=image, CONTAINER_MOUNTS="/data:/data")
    status, output = job.run(job.script('printf "<%s>" "$@"'), "8", "two words", "--", "--lr", "1e-3")
    assert (status, output, job.requeued) == (0, "<8><two words><--><--lr><1e-3>", 0)
    options, environment = json.loads((job.commands / "srun.json").read_text())
    expected = {"MASTER_ADDR": "node7", "MASTER_PORT": "14321", "DATA_DIR": "/pile with spaces"}
    assert expected.items() <= environment.items() and {"--export=ALL", "--kill-on-bad-exit=1"} <= set(options)
    folder = [f"--container-workdir={tmp_path}", f"--container-mounts={tmp_path}:{tmp_path},/data:/data"]
    container = [option for option in options if option.startswith("--container")]
    assert container == ([f"--container-image={image}", *folder] if image else [])
    assert environment.get("PYTHON") == ("python" if image else None)
    job.environment["SLURM_GPUS_ON_NODE"] = "4"  # passed on if the script is called without a number of GPUs
    for given, expected in (([], "<4>"), (["--", "--lr"], "<4><--><--lr>"), (["8"], "<8>")):
        assert job.run(job.script('printf "<%s>" "$@"'), *given) == (0, expected)


SAVES = "trap 'exit 143' TERM; touch ready; for _ in {1..300}; do sleep 0.1; done"


@pytest.mark.parametrize(("script", "state", "status", "requeued"), [
    (SAVES, "RUNNING", 143, 1),
    (SAVES, "CANCELLED", 143, 0),  # canceled by the user
    (SAVES.replace("143", "1"), "RUNNING", 1, 0),  # the training could not save
    (SAVES.replace("143", "3"), "COMPLETING", 3, 0),  # the training has failed
])  # fmt: skip
def test_sigterm(script: str, state: str, status: int, requeued: int, tmp_path: Path) -> None:
    job = Job(tmp_path)
    process = job.start(job.script(script))
    wait_until((job.submit / "ready").exists, process)
    (job.commands / "state").write_text(f"JobState={state}")
    process.send_signal(signal.SIGTERM)
    if state != "RUNNING":  # Slurm signals the tasks too
        subprocess.run([job.commands / "scancel", "--signal=TERM", "4321"], check=True)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, job.requeued) == (status, requeued), output


@pytest.mark.parametrize(("arguments", "environment", "message"), [
    ([], {}, "no training script: sbatch ... train.sbatch scripts/train_llama_....sh"),
    (["train_nothing.sh"], {}, "there is no train_nothing.sh in"),
    (["train.sh"], {"SLURM_JOB_ID": ""}, "not in a Slurm job: sbatch --nodes 2"),
    (["train.sh", "8", "--", "--ckpt-step", "4"], {"SLURM_RESTART_COUNT": "1"}, "without --ckpt-step"),
    (["train.sh", "8", "--", "--ckpt-step=4"], {"SLURM_RESTART_COUNT": "1"}, "without --ckpt-step"),
])  # fmt: skip
def test_errors(arguments: list[str], environment: dict[str, str], message: str, tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.environment |= environment
    status, output = job.run(*arguments)
    assert status == 2 and output.startswith("error: ") and output.count("\n") == 1
    assert message in output
