"""A core of `tools/parity`: layouts of up to four processes against one, with router gradients, counts and λ."""

from pathlib import Path

import pytest
import torch

from tests.entry import Entry
from tools.parity.command import as_hybrid
from tools.parity.layouts import LAYOUTS, Layout
from tools.parity.measure import RECORD, TIMEOUT, Training, TrainingFailed, by_torchrun, compare, train

SINGLE = Layout(1, [])
CORE = [
    ("plain", "DP2, distributed optimizer, overlap"),
    ("plain", "TP2 + SP"),
    ("plain", "EP2, alltoall"),
    ("plain", "EP2, allgather"),
    ("plain", "TP2 x EP2, expert TP 2"),
    ("dense and MoE layers", "PP2, 2 virtual stages"),
    ("dense and MoE layers", "PP2 x EP2"),
]
CORE_HYBRID = [("plain", "TP2 x EP2, expert TP 2"), ("dense and MoE layers", "PP2, 2 virtual stages")]
CORE_TOPK = [("plain", "TP2 x EP2, expert TP 2")]


class References:
    """One process's training of each variant, from a checkpoint that its layouts start from too."""

    def __init__(self, entry: Entry, data: Path, folder: Path) -> None:
        self.entry, self.data, self.folder = entry, data, folder

    def launch(self, arguments: list[str], processes: int, folder: Path, log: Path) -> int:
        """As `by_torchrun`, with Megatron imported already, except on a GPU, which a fork cannot use."""
        if torch.cuda.is_available():
            return by_torchrun(arguments, processes, folder, log)
        record = {"PARITY_RECORD": str(folder)}
        code, output = self.entry.run(arguments, record, processes=processes, script=RECORD, limit=TIMEOUT)
        log.write_text(output)
        return -1 if code is None else code

    def train(
        self, variant: str, layout: str | None, steps: int = 8, routing: str = "ReMoE", model: str = "gpt"
    ) -> Training:
        """Train in a layout, or in one process."""
        folder = self.folder / routing / variant
        initial, place = folder / "initial", folder / f"{model} {layout or 'one'}"
        begin = ["--train-iters", "1", "--save", str(initial / "checkpoint"), "--save-interval", "1"]
        train(initial, self.data, SINGLE, routing, variant, *begin, launch=self.launch)
        start = as_hybrid(initial / "checkpoint") if model == "hybrid" else initial / "checkpoint"
        more = ["--train-iters", str(steps), "--load", str(start), "--finetune"]
        split = LAYOUTS[layout] if layout else SINGLE
        return train(place, self.data, split, routing, variant, *more, model=model, launch=self.launch)


@pytest.fixture(scope="module")
def references(entry: Entry, data: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(entry, data, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize(("variant", "layout"), CORE)
def test_same_training(variant: str, layout: str, references: References) -> None:
    difference = compare(references.train(variant, layout), references.train(variant, None))
    assert difference.loss < 1e-4 and difference.gradient < 1e-4
    assert difference.sparsity is not None and difference.sparsity < 1e-3
    assert difference.counts_equal and difference.exponents_equal


@pytest.mark.parametrize(("variant", "layout"), CORE_HYBRID)
def test_same_training_as_hybrid(variant: str, layout: str, references: References) -> None:
    """HybridModel in a layout against GPTModel in one process."""
    difference = compare(references.train(variant, layout, model="hybrid"), references.train(variant, None))
    assert difference.loss < 1e-4 and difference.gradient < 1e-4
    assert difference.counts_equal and difference.exponents_equal


@pytest.mark.parametrize(("variant", "layout"), CORE_TOPK)
def test_same_training_with_topk(variant: str, layout: str, references: References) -> None:
    """Megatron's router in the same layers: where it parts too, the error is not the ReLU router's."""
    difference = compare(
        references.train(variant, layout, routing="top-k"), references.train(variant, None, routing="top-k")
    )
    assert difference.loss < 1e-4 and difference.gradient < 1e-4


def test_a_difference_is_seen(references: References) -> None:
    """The measure itself, by torchrun: another λ₀ must show in loss, sparsity and λ, a shorter training is refused."""
    right = references.train("plain", None)
    other = train(
        references.folder / "other", references.data, SINGLE, "ReMoE", "plain", "--train-iters", "8",
        "--load", str(references.folder / "ReMoE" / "plain" / "initial" / "checkpoint"), "--finetune", "--lr", "2e-3",
    )  # fmt: skip
    difference = compare(other, right)
    assert difference.loss > 1e-4 and difference.gradient == 0.0 and difference.counts_equal
    assert difference.sparsity > 1e-3
    shorter = Training(
        right.losses[1:], right.sparsities, right.coefficients, right.exponents, right.counts, right.gradients
    )
    with pytest.raises(TrainingFailed, match="7 steps of 8"):
        compare(shorter, right)
