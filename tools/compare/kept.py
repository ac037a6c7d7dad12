"""What all calls of a comparison found of a corpus, in one JSON file."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..common.errors import ToolError
from ..common.files import write_json
from ..quickstart.stages import read_stamp
from ..sweep.plan import Run
from .recipes import Recipe
from .table import Result, Results


@dataclass(frozen=True)
class Kept:
    """Of trainings with the same `inputs`.

    inputs: a fingerprint of what all trainings have in common.
    tuned: row → what its tuning came to.
    results: row → seed → what came out.
    """

    inputs: str
    tuned: dict[str, Recipe] = field(default_factory=dict)
    results: dict[str, dict[int, Result]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, inputs: str) -> "Kept":
        """What is there; nothing if there is no file.

        Raises:
            ToolError: it is of other inputs, or damaged.
        """
        if not path.exists():
            return cls(inputs)
        stamp = read_stamp(path, inputs)
        if stamp is None:
            raise ToolError(
                f"{path} is of trainings with other --train-iters, --tuning-iters or Megatron flags, or damaged. "
                "Give --output-dir another folder, or take the file away."
            )
        tuned = {
            row: Recipe(run, tuple(of["flags"]))
            for row, of in stamp["tuned"].items()
            if (run := Run.from_name(of["run"])) is not None
        }
        results = {
            row: {int(seed): Result(**found) for seed, found in of.items()} for row, of in stamp["results"].items()
        }
        return cls(inputs, tuned, results)

    def add(self, results: Results, tuned: Mapping[str, Recipe]) -> None:
        """Take in what was found now."""
        self.tuned.update(tuned)
        for row, of in results.items():
            before = self.results.get(row, {})
            now = {
                seed: replace(found, routing=found.routing or before[seed].routing) if seed in before else found
                for seed, found in of.items()
            }
            self.results[row] = dict(sorted((before | now).items()))

    def write(self, path: Path) -> None:
        """Aside, and renamed."""
        tuned = {row: {"run": of.run.name, "flags": of.flags} for row, of in self.tuned.items()}
        results = {row: {seed: asdict(found) for seed, found in of.items()} for row, of in self.results.items()}
        write_json(path, {"inputs": self.inputs, "tuned": tuned, "results": results})

    def of(self, rows: Iterable[str]) -> dict[str, dict[int, Result]]:
        """Those rows that are there."""
        return {row: self.results[row] for row in rows if row in self.results}
