"""The training entry, imported once for many short trainings."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.trainings import REPOSITORY

LIMIT = 30.0  # seconds for one training: longer is a hang


class Entry:
    """A process that holds the entry, and a child of it for each training."""

    def __init__(self, output: Path) -> None:
        self.output = output
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        self.process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests" / "entry_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | single | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, arguments: list[str], environment: dict[str, str], unset: list[str]) -> tuple[int | None, str]:
        """Exit code, None after the time limit, and all that was printed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"arguments": arguments, "environment": environment, "unset": unset, "limit": LIMIT}
        self.process.stdin.write(json.dumps(request | {"output": str(self.output)}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.strip() == "null" or line.strip().lstrip("-").isdecimal():
                return json.loads(line), self.output.read_text(errors="replace")
        raise AssertionError("the server of the entry has ended")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
