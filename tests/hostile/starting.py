"""Start the training entry several times at once, in forks of this process: starting.py COUNT FOLDER FLAGS.

Each writes what it prints to FOLDER/0, FOLDER/1, ...; the exit codes are printed.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from tools.common.places import ROOT


def start(number: int, folder: Path) -> int:
    """Become one of the trainings."""
    output = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    time.sleep(0.01 * number * number)
    try:
        runpy.run_path(str(ROOT / "pretrain_gpt.py"), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    count, folder = int(sys.argv[1]), Path(sys.argv[2])
    del sys.argv[1:3]
    children = []
    for number in range(count):
        child = os.fork()
        if not child:
            os._exit(start(number, folder))
        children.append(child)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
