"""Runs the training entry once per request in a forked child, so that Megatron is imported only once.

A line of JSON on standard input asks: {"arguments", "environment", "unset", "output", "limit"}; what the child prints
goes to the file "output". A line on standard output answers: its exit code, or null after `limit` seconds.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

sys.path[0] = str(Path(__file__).resolve().parents[1])

import pretrain_gpt  # noqa: E402
from megatron.remoe import cpu  # noqa: E402


def child(request: dict[str, Any]) -> NoReturn:
    """End as the entry would, started with these arguments in this environment."""
    output = os.open(request["output"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.setpgid(0, 0)
    os.environ.update(request["environment"])
    for name in request["unset"]:
        os.environ.pop(name, None)
    sys.argv = ["pretrain_gpt.py", *request["arguments"]]
    code = 0
    try:
        pretrain_gpt.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code(pid: int, limit: float) -> int | None:
    """Wait for a child; kill it and its children after `limit` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    if cpu.is_wanted([]):
        cpu.install()
    import megatron.training  # noqa: F401  # children need not

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork() or child(request)
        print(json.dumps(exit_code(pid, request["limit"])), flush=True)
