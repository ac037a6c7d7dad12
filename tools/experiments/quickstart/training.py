"""Run one training with its output in a file."""

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ...console.errors import ToolError
from ...console.files import make_empty, read_stamp, write_json
from ...console.places import entry, short
from ...runs.figure_reader import LOG, read_figures
from ...runs.training_display import ShownTraining, TrainingDisplay


@dataclass(frozen=True)
class Training:
    """One model's training.

    Attributes:
        model: key of `tiny.NAMES`.
        folder: for its files.
        flags: Megatron's.
        evaluations: number of held-out sets.
        inputs: fingerprint of everything that decides the result.
    """

    model: str
    folder: Path
    flags: list[str]
    evaluations: int
    inputs: str

    def is_done(self) -> bool:
        """Return whether it was trained and evaluated with these inputs."""
        return read_stamp(self.folder / "done.json", self.inputs) is not None

    def prepare(self) -> Path | None:
        """Keep the files of an interrupted run with the same inputs; rename the folder of one with others.

        Returns:
            The folder's new name; None if it was not renamed.
        """
        if read_stamp(self.folder / "inputs.json", self.inputs) is not None:
            return None
        old = None
        if self.folder.exists():
            names = (self.folder.with_name(f"{self.folder.name}.old{number}") for number in itertools.count(1))
            old = self.folder.rename(next(name for name in names if not name.exists()))
        write_json(make_empty(self.folder) / "inputs.json", {"inputs": self.inputs})
        return old


def run(training: Training, display: TrainingDisplay, shown: ShownTraining) -> None:
    """Train to the end with one thread, and mark the training as done.

    Raises:
        ToolError: the training failed; the message holds the end of its log.
        KeyboardInterrupt: all were stopped.
    """
    if old := training.prepare():
        changed = "--seed, code, text or versions have changed"
        display.say(f"{shown.title}: {changed}; it starts from iteration 0. Its earlier files are in {short(old)}.")
    command = [sys.executable, *entry(), *training.flags]
    with (training.folder / LOG).open("a", encoding="utf-8", buffering=1) as log:
        print(f"$ OMP_NUM_THREADS=1 {' '.join(command)}", file=log)
        code, cause = display.run(shown, command, os.environ | {"OMP_NUM_THREADS": "1"}, log)
    if code or len(read_figures(training.folder).evaluations) < training.evaluations:
        reason = f"ended with exit code {code}" if code else "ended before its evaluation did"
        raise ToolError(
            f"The training of {shown.name} {reason}. The end of its log:\n\n{cause}\n\n"
            f"The whole log: {training.folder / LOG}\nFix the cause and run the same command: it goes on."
        )
    write_json(training.folder / "done.json", {"inputs": training.inputs})
