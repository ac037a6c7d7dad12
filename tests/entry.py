"""Train many short runs, and import the training entry only once."""

import atexit
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.console.places import ROOT

LIMIT = 30.0  # seconds for one training run; longer is a hang


class Entry:
    """A process that has imported the entry and forks one child per rank for each training run."""

    def __init__(self) -> None:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        self.numbers = itertools.count()
        command, pipe = [sys.executable, str(ROOT / "tests" / "entry_server.py")], subprocess.PIPE
        environment = os.environ | single | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def run(
        self,
        arguments: Sequence[str],
        environment: dict[str, str] | None = None,
        processes: int = 1,
        script: Path = ROOT / "pretrain_gpt.py",
        limit: float = LIMIT,
        kill: tuple[int, str, float] | None = None,
    ) -> tuple[int | None, str]:
        """Run the entry, or a script around it, as torchrun would with this number of processes.

        Args:
            kill: signal, file and seconds. The processes get the signal this long after the file appears, or after
                their start if its name is empty.

        Returns:
            The exit code (None after the time limit), and the output.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        number = next(self.numbers)
        with tempfile.NamedTemporaryFile("r", errors="replace") as output:
            request = {"number": number, "output": output.name, "script": str(script), "processes": processes}
            request |= {"arguments": list(arguments), "environment": environment or {}}
            self.process.stdin.write(json.dumps(request | {"limit": limit, "kill": kill}) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith(f"answer {number} "):  # not a late answer to a test that ran out of time
                    return json.loads(line.split()[2]), output.read()
        raise AssertionError("the server of the entry has ended")


@functools.cache
def shared_entry() -> Entry:
    """Return the entry that all tests of this process share."""
    entry = Entry()
    atexit.register(entry.process.kill)  # it would not end by itself: forks of this process hold its input open
    return entry
