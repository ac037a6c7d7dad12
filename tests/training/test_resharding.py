"""Test that a checkpoint with optimizer state resumes in another layout, with the steps of one whole training."""

from pathlib import Path

import pytest

from tests.tiny_model import RELU
from tests.training_runs import TINY, run, series

RESHARDABLE = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "one process, distributed optimizer": (1, ["--use-distributed-optimizer"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "DP2, distributed optimizer": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split(),
    ),
    "DP2, reshardable": (2, RESHARDABLE),
    "TP2, reshardable": (2, [*TP2, *RESHARDABLE]),
    "experts one by one": (1, ["--no-local-layer-fusion"]),
    "expert TP2": (2, [*TP2, "--expert-tensor-parallel-size", "2"]),
}
CHANGES = [
    ("PP2", "one process"),
    ("DP2, distributed optimizer", "one process, distributed optimizer"),
    ("DP2, reshardable", "TP2, reshardable"),
    ("experts one by one", "expert TP2"),
]
SAVED, END = 2, 4


def train(data: Path, layout: str, *more: str) -> str:
    processes, flags = LAYOUTS[layout]
    settings = ["--train-iters", str(END), "--save-interval", str(SAVED), "--moe-relu-l1-reg-coeff-init", "1e-3"]
    return run([*TINY, *RELU, "--data-path", str(data), *settings, *flags, *more], processes)


class Sources:
    """Training runs in each layout that start from one checkpoint and save at `SAVED`; each runs when first needed."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder
        first = ["--train-iters", "1", "--save", str(folder / "initial"), "--save-interval", "1"]
        train(data, "one process", *first)
        self.expected = self._start("one process")

    def _start(self, layout: str) -> str:
        start = ["--load", str(self.folder / "initial"), "--finetune", "--save", str(self.folder / layout)]
        return train(self.data, layout, *start)

    def checkpoint(self, layout: str) -> list[str]:
        """Return the flags that resume from the layout's checkpoint."""
        if not (self.folder / layout).exists():
            self._start(layout)
        return ["--load", str(self.folder / layout), "--ckpt-step", str(SAVED)]


@pytest.fixture(scope="module")
def sources(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(data, tmp_path_factory.mktemp("resharding"))


@pytest.mark.parametrize(
    ("source", "target"),
    CHANGES,
    ids=[" to ".join(change) for change in CHANGES],
)
def test_next_steps_are_the_same(source: str, target: str, data: Path, sources: Sources) -> None:
    output = train(data, target, *sources.checkpoint(source))
    # The second line after a start has the mean loss of both steps.
    losses, expected = series(output, "lm loss"), series(sources.expected, "lm loss")[SAVED:]
    expected[1] = (expected[0] + expected[1]) / 2
    assert losses == pytest.approx(expected, rel=1e-4)
    assert series(output, "l1 coefficient") == series(sources.expected, "l1 coefficient")[SAVED:]
    assert series(output, "sparsity") == pytest.approx(series(sources.expected, "sparsity")[SAVED:], abs=1e-3)
