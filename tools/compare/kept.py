"""What all calls of a comparison found of a corpus, in one JSON file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..quickstart.stages import read_stamp, write_json
from ..sweep.plan import Run
from ..sweep.run_log import Outcome
from .recipes import Recipe
from .table import markdown


@dataclass(frozen=True)
class Kept:
    """Of trainings with the same `inputs`.

    inputs: a fingerprint of what all trainings have in common.
    tuned: row → what its tuning came to.
    losses: row → seed → nats per byte.
    settled: row → seed → the step from which S stays at its target, None where it does not.
    """

    inputs: str
    tuned: dict[str, Recipe] = field(default_factory=dict)
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    settled: dict[str, dict[int, int | None]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, inputs: str) -> "Kept":
        """What is there; nothing if there is no file, or it is of other inputs."""
        stamp = read_stamp(path, inputs)
        if stamp is None:
            return cls(inputs)
        tuned = {
            row: Recipe(run, tuple(of["flags"]))
            for row, of in stamp["tuned"].items()
            if (run := Run.from_name(of["run"])) is not None
        }
        losses, settled = (
            {row: {int(seed): value for seed, value in of.items()} for row, of in stamp[name].items()}
            for name in ("losses", "settled")
        )
        return cls(inputs, tuned, losses, settled)

    def add(self, outcomes: Mapping[str, Mapping[int, Outcome]], tuned: Mapping[str, Recipe]) -> None:
        """Take in what was found now."""
        self.tuned.update(tuned)
        for row, by_seed in outcomes.items():
            for seed, outcome in by_seed.items():
                if outcome.test_loss is not None:
                    self.losses.setdefault(row, {})[seed] = outcome.test_loss
                    self.settled.setdefault(row, {})[seed] = outcome.settled

    def write(self, path: Path) -> None:
        """Aside, and renamed."""
        write_json(
            path,
            {
                "inputs": self.inputs,
                "tuned": {row: {"run": of.run.name, "flags": of.flags} for row, of in self.tuned.items()},
                "losses": {row: dict(sorted(of.items())) for row, of in self.losses.items()},
                "settled": {row: dict(sorted(of.items())) for row, of in self.settled.items()},
            },
        )

    def of(self, rows: Iterable[str]) -> dict[str, dict[int, float]]:
        """The losses of those rows that are there."""
        return {row: self.losses[row] for row in rows if row in self.losses}

    def table(self, rows: Iterable[str], with_steps: bool) -> str:
        """As Markdown."""
        return markdown(self.of(rows), self.tuned, self.settled if with_steps else {})
