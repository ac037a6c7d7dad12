"""Train on a real Slurm: two nodes on one machine. Run on demand with `pytest -m slurm`.

Slurm and munge come from the system's packages (Debian: slurm-wlm, munge). The daemons run as root, in the test's own
folder and on free ports; each node has its own mounts. Its GPUs are device files that nobody opens.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.scripts.launching import SCRIPTS, alone
from tests.training_runs import SMALL, records, wait_until

PROGRAMS = ("slurmctld", "slurmd", "munged", "unshare")
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"needs root and {', '.join(PROGRAMS)}"),
]
NODES = ("n1", "n2")
TRAIN = SCRIPTS / "train_llama_182m_remoe.sh"
FLAGS = [*SMALL, *"--moe-ffn-hidden-size 128 --split 90,10,0 --eval-iters 0 --save-interval 10".split()]
CONFIGURATION = """
ClusterName=remoe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES GraceTime=60
PartitionName=urgent Nodes=n1,n2 PriorityTier=10
"""


class Cluster:
    """The daemons of two nodes and their controller.

    Attributes:
        folder: holds all files of the daemons. Node n2 sees an empty folder in place of `folder/local`.
        environment: the variables with which Slurm's commands find this cluster.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, dict[str, subprocess.Popen[bytes]]()
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "local", "empty", *NODES):
            (folder / name).mkdir()
        host, ports = socket.gethostname(), find_free_ports(3)
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=ports))
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        gres = [f"NodeName={node} Name=gpu File={folder}/{node}-gpu[0-1]\n" for node in NODES]
        (folder / "gres.conf").write_text("".join(gres))
        for name in (f"{node}-gpu{gpu}" for node in NODES for gpu in range(2)):
            os.mknod(folder / name, 0o020666, os.makedev(1, 3))  # a second /dev/null
        (folder / "hosts").write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {' '.join(NODES)}\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            environment = alone(self.environment | {"PATH": f"{os.environ['PATH']}:/usr/sbin"})
            self.daemons[name] = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

    def start_controller(self) -> None:
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self.start("munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        wait_until((self.folder / "munge.socket").exists, self.daemons["munged"])
        self.start("slurmctld", "slurmctld", "-D")

    def start_node(self, node: str) -> None:
        mounts = {"hosts": "/etc/hosts"} | ({"empty": self.folder / "local"} if node == "n2" else {})
        binds = [f"mount --bind {self.folder}/{source} {target}" for source, target in mounts.items()]
        self.start(node, "unshare", "--mount", "bash", "-c", " && ".join([*binds, f"exec slurmd -D -N {node}"]))
        wait_until(lambda: node in self.call("sinfo", "--noheader", "--states=idle", "--Node"), self.daemons[node])

    def call(self, *command: str) -> str:
        """Run one of Slurm's commands; return its output, also if it fails."""
        return subprocess.run(command, capture_output=True, text=True, env=alone(self.environment)).stdout

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon and all that it has started, as if the machine had lost power."""
        mounts = read_mounts(self.daemons[node].pid)
        for number in psutil.pids():
            if read_mounts(number) == mounts:
                os.kill(number, signal.SIGKILL)
        self.daemons[node].wait()

    def end(self) -> None:
        self.call("scancel", "--user=root")
        wait_until(lambda: not self.call("squeue", "--noheader"))
        for daemon in reversed(self.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            daemon.wait(30)


def find_free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def read_mounts(process: int) -> str | None:
    """Return the name of a process's mount namespace; None if the process has ended or is not ours."""
    try:
        return os.readlink(f"/proc/{process}/ns/mnt")
    except (FileNotFoundError, PermissionError):
        return None


class Job:
    """A training run that was submitted as README says, on both nodes, with expert parallelism over them."""

    def __init__(self, cluster: Cluster, folder: Path, *words: str, options=(), **environment: str) -> None:
        self.cluster, self.run, self.file = cluster, folder / "run", folder / "job.out"
        job_file = str(SCRIPTS / "slurm" / "train.sbatch")
        command = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1", f"--output={self.file}"]
        settings = {"EP": "2", "OUTPUT_DIR": str(self.run), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        settings |= cluster.environment | environment
        command += [*options, job_file, str(TRAIN), *words, "--", *FLAGS]
        result = subprocess.run(command, capture_output=True, text=True, env=alone(settings), cwd=folder)
        assert result.returncode == 0, result.stderr
        self.number = result.stdout.strip()

    @property
    def output(self) -> str:
        return self.file.read_text() if self.file.exists() else ""

    def show(self, field: str) -> str:
        """Return a field of `scontrol show job`."""
        fields = self.cluster.call("scontrol", "--oneliner", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in fields if "=" in word).get(field, "")

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: max(records(self.output), default=0) >= step or self.show("JobState") in ENDED)
        assert max(records(self.output)) >= step, self.output[-6000:]

    def wait_for_end(self) -> str:
        """Return the state in which the job ended."""
        wait_until(lambda: self.show("JobState") in ENDED)
        return self.show("JobState")

    def read_saved(self) -> int:
        return int((self.run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())

    def check_resumed(self, message: bool = True) -> None:
        """Wait until the requeued job goes on from the newest checkpoint, then cancel it."""
        wait_until(lambda: self.show("Restarts") == "1" and self.show("JobState") == "RUNNING")
        first, saved = max(records(self.output)), self.read_saved()
        assert saved in (first, first + 1)  # the last line can be missing
        assert ("is queued again" in self.output) == message
        self.wait_for_step(saved + 5)
        assert f"from iteration {saved}" in self.output or f"at iteration {saved}" in self.output
        self.cluster.call("scancel", self.number)
        assert self.wait_for_end() == "CANCELLED"


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start_controller()
        for node in NODES:
            cluster.start_node(node)
        yield cluster
    finally:
        cluster.end()


@pytest.fixture
def endless(cluster: Cluster, data: Path, tmp_path: Path) -> Job:
    """Start a training run that does not end, and wait for its tenth step."""
    job = Job(cluster, tmp_path, "1", "1000000", "2", DATA_PATH=str(data))
    job.wait_for_step(10)
    return job


def test_readme_command_trains_on_two_nodes(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "1", "20", "2", DATA_PATH=str(data))
    assert job.wait_for_end() == "COMPLETED", job.output[-6000:]
    assert (job.read_saved(), max(records(job.output))) == (20, 20)
    assert {"train.log", "train.node1.log"} <= {path.name for path in job.run.iterdir()}
    assert "world_size ...................................... 2" in job.output and job.show("Restarts") == "0"


def test_script_gets_the_nodes_number_of_gpus(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, options=["--gpus-per-node=2"], DATA_PATH="x", DRY_RUN="command")
    assert job.wait_for_end() == "COMPLETED", job.output
    assert "--nproc-per-node 2" in job.output and "--nnodes 2" in job.output


def test_time_limit_saves_and_requeues(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    limits = ("--time=2", "--signal=B:TERM@60")
    job = Job(cluster, tmp_path, "1", "1000000", "2", options=limits, DATA_PATH=str(data))
    job.check_resumed()


def test_scancel_with_a_signal_to_the_job_file_saves_and_requeues(endless: Job) -> None:
    endless.cluster.call("scancel", "--batch", "--signal=TERM", endless.number)
    endless.check_resumed()


def test_scancel_saves(endless: Job) -> None:
    endless.cluster.call("scancel", endless.number)
    assert endless.wait_for_end() == "CANCELLED"
    wait_until(lambda: "Stopped. The same command continues" in endless.output)
    assert endless.read_saved() >= 10 and endless.show("Restarts") == "0"


@pytest.mark.parametrize("parameters", ["", "send_user_signal"])
def test_preempted_job_saves_and_is_requeued(parameters: str, endless: Job) -> None:
    """By default Slurm signals the steps and requeues the job itself; with the parameter it signals the job file."""
    cluster = endless.cluster
    configuration = cluster.folder / "slurm.conf"
    before = configuration.read_text()
    configuration.write_text(before + f"PreemptParameters={parameters}\n" * bool(parameters))
    cluster.call("scontrol", "reconfigure")
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    cluster.call(*urgent)
    endless.check_resumed(message=bool(parameters))
    configuration.write_text(before)
    cluster.call("scontrol", "reconfigure")


def test_killed_node_requeues_from_the_last_checkpoint(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "1", "1000000", "2", DATA_PATH=str(data))
    job.wait_for_step(25)
    cluster.kill_node("n2")
    wait_until(lambda: "down" in cluster.call("sinfo", "--noheader", "--nodes=n2", "--format=%T"))
    saved = job.read_saved()
    cluster.start_node("n2")
    wait_until(lambda: job.show("Restarts") == "1")
    job.wait_for_step(max(records(job.output)) + 5)
    assert saved >= 20 and saved % 10 == 0
    cluster.call("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"


def test_data_that_one_node_lacks_is_an_error(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", cluster.folder / "local" / f"text{suffix}")
    path = str(cluster.folder / "local" / "text")
    job = Job(cluster, tmp_path, "1", "20", "2", DATA_PATH=path)
    assert job.wait_for_end() == "FAILED" and job.show("Restarts") == "0"
    assert path in job.output and "REMOE-E" in job.output, job.output[-6000:]
