"""Keep the results of all calls of a comparison on one corpus in one JSON file."""

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
class SavedResults:
    """Results of trainings with the same inputs.

    Attributes:
        inputs: a fingerprint of what all trainings have in common.
        tuned: row → the chosen settings.
        results: row → seed → result.
    """

    inputs: str
    tuned: dict[str, Recipe] = field(default_factory=dict)
    results: dict[str, dict[int, Result]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, inputs: str) -> "SavedResults":
        """Read a file, which need not exist.

        Raises:
            ToolError: the file is damaged, or has other inputs.
        """
        if not path.exists():
            return cls(inputs)
        stamp = read_stamp(path, inputs)
        if stamp is None:
            raise ToolError(
                f"{path} is damaged, or holds results with other --train-iters, --tuning-iters or Megatron flags. "
                "Give --output-dir another folder, or remove the file."
            )
        runs = {row: (Run.from_name(of["run"]), tuple(of["flags"])) for row, of in stamp["tuned"].items()}
        return cls(
            inputs,
            {row: Recipe(run, flags) for row, (run, flags) in runs.items() if run is not None},
            {row: {int(seed): Result(**found) for seed, found in of.items()} for row, of in stamp["results"].items()},
        )

    def add(self, results: Results, tuned: Mapping[str, Recipe]) -> None:
        """Add new results; keep the analysis of a training that is already there."""
        self.tuned.update(tuned)
        for row, of in results.items():
            before = self.results.get(row, {})
            now = {
                seed: replace(found, routing=found.routing or before[seed].routing) if seed in before else found
                for seed, found in of.items()
            }
            self.results[row] = dict(sorted((before | now).items()))

    def write(self, path: Path) -> None:
        """Write the file."""
        tuned = {row: {"run": of.run.name, "flags": of.flags} for row, of in self.tuned.items()}
        results = {row: {seed: asdict(found) for seed, found in of.items()} for row, of in self.results.items()}
        write_json(path, {"inputs": self.inputs, "tuned": tuned, "results": results})

    def of(self, rows: Iterable[str]) -> dict[str, dict[int, Result]]:
        """Return the results of these rows; rows without results are left out."""
        return {row: self.results[row] for row in rows if row in self.results}
