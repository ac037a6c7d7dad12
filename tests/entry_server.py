"""Run the training entry, or a script around it, in forked children for each request; import Megatron only once.

A request is a line of JSON on standard input: {"number", "arguments", "environment", "processes", "script", "output",
"limit", "kill"}. The children print to the file "output". The answer is a line on standard output: "answer",
the number, and the exit code, or null after `limit` seconds. "kill" is null or [signal, file, seconds]: the children
get the signal this long after the file appears, or after their start if its name is empty.
"""

import argparse
import ast
import atexit
import contextlib
import functools
import inspect
import json
import math
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402

from megatron.remoe import cpu  # noqa: E402


def child(request: dict[str, Any], rank: dict[str, str]) -> NoReturn:
    """Run the script with the request's arguments and environment, and exit with its code."""
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.setpgid(0, 0)
    os.environ.update(rank | request["environment"])
    sys.argv = [request["script"], *request["arguments"]]
    code = 0
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def hold_store(writing: int) -> NoReturn:
    """Serve the store through which ranks meet, until killed. As with torchrun, no rank owns it."""
    os.setpgid(0, 0)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writing, str(store.port).encode())
    while True:
        signal.pause()


def answer(request: dict[str, Any]) -> int | None:
    """Run the ranks until all end, one fails or time is up; return the exit code, or None if time is up."""
    count, holders = request["processes"], []
    ranks: list[dict[str, str]] = [{}]
    if count > 1:
        reading, writing = os.pipe()
        holders = [os.fork() or hold_store(writing)]  # not in a thread: this process forks
        world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": os.read(reading, 9).decode()}
        world["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        ranks = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        os.close(reading)
        os.close(writing)
    running = [os.fork() or child(request, rank) for rank in ranks]
    deadline, code = time.monotonic() + request["limit"], 0
    number, awaited, seconds = request["kill"] or (0, None, 0.0)
    moment = time.monotonic() + seconds if awaited == "" else math.inf
    while running and code == 0 and time.monotonic() < deadline:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                code = code or os.waitstatus_to_exitcode(status)
        if awaited and os.path.exists(awaited):
            moment, awaited = time.monotonic() + seconds, ""
        if time.monotonic() > moment:
            with contextlib.suppress(ProcessLookupError):  # no process group yet: try again in the next round
                for pid in running:
                    os.killpg(pid, number)
                moment = math.inf
        time.sleep(0.002 if request["kill"] else 0.01)
    for pid in (*running, *holders):
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None if running and code == 0 else code


if __name__ == "__main__":
    if cpu.is_wanted([]):
        cpu.install()
    # Import this once, so that the children do not have to. Megatron makes some help texts from its own sources.
    import megatron.core.datasets.helpers_cpp
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text.text_tokenizer
    import megatron.remoe.pretrain
    import megatron.remoe.start.data
    import megatron.remoe.start.run_lock
    import megatron.remoe.start.saved_settings
    import megatron.remoe.training.build
    import megatron.remoe.training.gpt
    import megatron.remoe.training.summary  # noqa: F401
    from megatron.training.arguments import add_megatron_arguments

    inspect.getsource, ast.parse = functools.cache(inspect.getsource), functools.cache(ast.parse)
    add_megatron_arguments(argparse.ArgumentParser())

    for line in sys.stdin:
        request = json.loads(line)
        print("answer", request["number"], json.dumps(answer(request)), flush=True)
