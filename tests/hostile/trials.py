"""Start a training in a disturbed folder, and return its outcome."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from tests.entry import shared_entry
from tests.tiny_model import RELU
from tests.trainings import TINY, weights

SAVED, STEPS = 4, 6
LIMIT = 300.0  # seconds; longer is a hang
# Output that no user should see. A prompt would end in one of the first two, because standard input is empty.
FORBIDDEN = ("Traceback", "EOFError", "[y/N]", "Segmentation fault")


def training(folder: Path, name: str, *more: str, steps: int = STEPS, saves: int = 2) -> list[str]:
    """Return the flags of a training of `folder/text` that saves to and resumes from `folder/name`."""
    flags = f"--num-workers 2 --save-interval {saves} --train-iters {steps} --lr-decay-iters {steps}".split()
    places = ["--data-path", str(folder / "text"), "--save", str(folder / name), "--load", str(folder / name)]
    return [*TINY, *RELU, *places, *flags, *more]


def check_words(output: str) -> None:
    """Assert that the output has nothing that no user should see."""
    for word in FORBIDDEN:
        assert word not in output, output[-4000:]


def same_weights(expected: Path, found: Path, iteration: int) -> bool:
    """Return whether all tensors of two checkpoints are equal bit for bit."""
    right, mine = tensors(expected, iteration), tensors(found, iteration)
    return right.keys() == mine.keys() and all(torch.equal(right[key], mine[key]) for key in right)


def tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors in either format, without random states: starting data loaders draws numbers."""
    files = sorted(folder.glob(f"iter_{iteration:07d}/mp_rank_*/*.pt"))
    if not files:
        return weights(folder, iteration)
    found, _ = tree_flatten_with_path([torch.load(file, weights_only=False) for file in files])
    return {
        keystr(path): value for path, value in found if isinstance(value, torch.Tensor) and "rng" not in keystr(path)
    }


@dataclass
class Trial:
    """A folder with text, its index cache and a run that can resume.

    Attributes:
        folder: the folder with all of it.
        expected: the folder of an undisturbed run.
        steps: number of steps of a whole run.
    """

    folder: Path
    expected: Path
    steps: int

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def resume(self, *more: str) -> str:
        """Resume to the end. Return "unharmed", "went back", "refused", or "not noticed" if final weights differ."""
        result = self.resume_anyhow(*more)
        if result == "refused" or same_weights(self.expected, self.run, self.steps):
            return result
        return "not noticed"

    def resume_anyhow(self, *more: str) -> str:
        """Resume to the end. Return "unharmed", "went back" or "refused"; do not compare the weights."""
        flags = training(self.folder, "run", *more)
        code, output = shared_entry().run(flags, limit=LIMIT)
        assert code is not None, f"it hangs: {output[-3000:]}"
        check_words(output)
        if code:
            last = output[output.rindex("pretrain_gpt.py: error: ") :]
            assert code in (1, 2) and len(last) < 1500, output[-4000:]
            return "refused"
        return "went back" if "Going back to iteration" in output else "unharmed"


def damage(path: Path, chance: random.Random, how: str) -> None:
    """Flip one bit of a file, cut it, or zero a block, at a random place. An empty file first gets 9 random bytes."""
    content = bytearray(path.read_bytes()) or bytearray(chance.randbytes(9))
    if how == "flip":
        place = chance.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
    elif how == "cut":
        del content[chance.randrange(len(content)) :]
    elif how == "zeros":  # a block that was never written
        start = chance.randrange(len(content))
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    os.chmod(path, 0o644)
    path.write_bytes(content)
