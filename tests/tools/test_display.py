"""What a tool in steps shows goes where it is sent."""

import os
import pty
import subprocess
import sys

from tests.trainings import REPOSITORY

STEPS = """
from tools.common.display import Display
with Display() as display, display.step("reading", 2):
    display.say("a result")
"""


def test_results_go_to_the_file_while_the_bar_is_on_the_terminal() -> None:
    terminal, side = pty.openpty()
    command = [sys.executable, "-c", STEPS]
    settings = {"cwd": REPOSITORY, "env": os.environ | {"TERM": "xterm"}, "timeout": 60, "text": True}
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=side, check=True, **settings)
    os.close(side)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert result.stdout == "a result\n"
    assert "reading" in shown and "a result" not in shown
