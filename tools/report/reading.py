"""What the files of a run tell: its figures by iteration, its arguments, its evaluations."""

import ast
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import ToolError
from ..common.log_reader import read_arguments, read_log, seconds_per_iteration
from ..sweep.run_log import settled_at

METRICS, LOG, TENSORBOARD = "metrics.jsonl", "train.log", "tensorboard"
# The names in metrics.jsonl of what Megatron prints, and of its scalars.
PRINTED = {
    **{"lm loss": "lm_loss", "learning rate": "learning_rate", "grad norm": "grad_norm"},
    **{
        "consumed samples": "consumed_samples",
        "global batch size": "global_batch_size",
        "sparsity": "sparsity",
        "target sparsity": "target_sparsity",
    },
    **{"l1 coefficient": "l1_coefficient", "l1 coefficient after the update": "l1_coefficient", "l1 loss": "l1_loss"},
}
SCALARS = {
    **{"lm loss": "lm_loss", "learning-rate": "learning_rate", "grad-norm": "grad_norm"},
    **{"iteration-time": "seconds_per_iteration", "moe_relu/sparsity": "sparsity"},
    **{"moe_relu/sparsity_target": "target_sparsity", "moe_relu/l1_reg_coeff": "l1_coefficient"},
    **{"moe_relu/l1_reg_loss": "l1_loss", "moe_relu_sparsity": "sparsity", "moe_relu_l1_reg_coeff": "l1_coefficient"},
}
_VALIDATION = re.compile(
    r"^ validation(?:-(\S+))? loss at iteration (\d+)(?: on validation set)? \| lm loss value: (\S+)", re.MULTILINE
)
_PADDED = re.compile(r"> padded vocab \(size: \d+\) .*\(new size: (\d+)\)")
_LAYER = re.compile(r"moe_relu/(sparsity|l1_reg_loss|tokens_per_expert)_layer_(\d+)(?:_expert_(\d+))?$")
_OF_LAYERS = {"sparsity": "layer_sparsity", "l1_reg_loss": "layer_l1_loss"}
_EVALUATED = {"text", "speed", "tasks"}  # what tools/evaluate writes
Row = dict[str, Any]


@dataclass
class Run:
    """A run.

    Attributes:
        name: of its folder.
        args: Megatron's arguments, by their names.
        rows: iteration → figures of the interval that ends there, named as in metrics.jsonl.
        validation: data set, "" for the only one → iteration → loss in nats per token.
        newest_validation: data set → the last loss that was measured.
        flips: iteration → what metrics.jsonl tells of routing decisions that changed.
        evaluations: file of tools/evaluate → what it holds.
        written: when the newest figures were, as Unix time.
        notes: what could not be told of it, and why.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, Row] = field(default_factory=dict)
    validation: dict[str, dict[int, float]] = field(default_factory=dict)
    newest_validation: dict[str, float] = field(default_factory=dict)
    flips: dict[int, Row] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    written: float = 0.0
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> tuple[list[int], list[Any]]:
        """Iterations that have this figure, and its values."""
        found = {iteration: row[key] for iteration, row in self.rows.items() if row.get(key) is not None}
        return list(found), list(found.values())

    def layers(self, key: str) -> dict[int, tuple[list[int], list[Any]]]:
        """Layer → iterations and values of a figure that is kept by layer."""
        found: dict[int, tuple[list[int], list[Any]]] = {}
        for iteration, of_layers in zip(*self.series(key), strict=True):
            for layer, value in of_layers.items():
                iterations, values = found.setdefault(int(layer), ([], []))
                iterations.append(iteration)
                values.append(value)
        return dict(sorted(found.items()))

    def batch_of(self, row: Row) -> int | None:
        """Sequences of a step of the interval that this row tells of; None where nothing tells."""
        found = row.get("global_batch_size") or self.args.get("global_batch_size")
        return None if found is None else int(found)

    def evaluated(self, name: str, iteration: int, loss: float) -> None:
        """Take an evaluation: of two at an iteration the first is the curve's, and the second that of the end."""
        self.validation.setdefault(name, {}).setdefault(iteration, loss)
        self.newest_validation[name] = loss

    @property
    def last(self) -> int:
        """The last iteration that is logged; 0 before the first."""
        return max(self.rows, default=0)

    @property
    def done(self) -> bool:
        """Whether no line of its log is left to come."""
        return self.last + self.args.get("log_interval", 1) > (self.args.get("train_iters") or math.inf)

    @property
    def num_experts(self) -> int:
        """Of a layer, after granularity; 0 for dense models, and where nothing tells."""
        counted = (of for row in self.rows.values() for of in row.get("tokens_per_expert", {}).values())
        return self.args.get("num_experts") or len(next(counted, ()))

    @property
    def topk(self) -> int | None:
        """After granularity; None for dense models, and where nothing tells."""
        return self.args.get("moe_router_topk") if self.num_experts else None

    @property
    def target(self) -> float | None:
        """Of S, for a ReMoE: the authors' fork does not log it, but has the same."""
        told = self.series("target_sparsity")[1]
        if told or not self.series("sparsity")[0]:
            return told[-1] if told else None
        return 1 - self.topk / self.num_experts if self.topk else None

    @property
    def settled(self) -> int | None:
        """The first iteration from which S stays within 1 % of its target; None where it does not."""
        found = zip(*self.series("sparsity"), strict=True)
        return None if self.target is None else settled_at({at: {"sparsity": s} for at, s in found}, self.target)

    def experts_per_token(self) -> tuple[list[int], list[float]]:
        """Iterations and the mean over tokens and layers, of a ReMoE."""
        experts = self.num_experts
        iterations, values = self.series("sparsity") if experts else ([], [])
        return iterations, [experts * (1 - value) for value in values]


def sources(place: Path) -> dict[str, Path]:
    """The files and folders that tell of a run: metrics.jsonl, or else what Megatron printed and its scalars.

    Args:
        place: a run's folder, its --save, or a file with Megatron's output.

    Raises:
        ToolError: there is none of them.
    """
    if place.is_file():
        return {METRICS if place.suffix == ".jsonl" else LOG: place}
    for folder in (place, place / "checkpoints"):
        if (folder / METRICS).exists():
            return {METRICS: folder / METRICS}
    run = place.parent if place.name == "checkpoints" else place
    found = {LOG: run / LOG} if (run / LOG).exists() else {}
    for folder in (run / TENSORBOARD, run):
        if any(folder.glob("events.out.tfevents.*")):
            return found | {TENSORBOARD: folder}
    if not found:
        looked_for = f"{METRICS}, checkpoints/{METRICS}, {LOG}, {TENSORBOARD}/events.out.tfevents.*"
        raise ToolError(f"{place}: no run: none of {looked_for}. Give a run's folder, its --save, or a log's file.")
    return found


def read_run(place: Path, name: str) -> Run:
    """All that the files of a run tell.

    Raises:
        ToolError: there are none.
    """
    run, found = Run(name), sources(place)
    for kind, read in ((METRICS, _read_metrics), (LOG, _read_printed), (TENSORBOARD, _read_tensorboard)):
        if kind in found:
            read(found[kind], run)
    run.rows = dict(sorted(run.rows.items()))
    for row in run.rows.values():
        sequences, length = run.batch_of(row), run.args.get("seq_length")
        if row.get("seconds_per_iteration") and sequences and length:
            row.setdefault("tokens_per_second", sequences * length / row["seconds_per_iteration"])
    run.written = run.written or max(path.stat().st_mtime for path in found.values())
    for path in sorted(place.glob("*.json")):
        held = _json(path.read_text(encoding="utf-8", errors="replace"))
        if isinstance(held, dict) and held and held.keys() <= _EVALUATED:
            run.evaluations[path.name] = held
    return run


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _read_metrics(path: Path, run: Run) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        entry = _json(line)
        if entry is None:  # half written
            continue
        if not isinstance(entry, dict) or not {"kind", "iteration"} <= entry.keys():
            raise ToolError(
                f"{path}: is no log of a run: line {number} has no kind and iteration. Give a run's folder, its "
                "--save, or a log's file."
            )
        iteration, run.written = entry["iteration"], entry.get("time", run.written)
        match entry["kind"]:
            case "start":
                run.args = entry.get("args", run.args)
            case "log":
                run.rows[iteration] = entry
            case "validation" if "lm_loss" in entry:
                run.evaluated(entry.get("set", ""), iteration, entry["lm_loss"])
            case "flips":
                run.flips[iteration] = entry


def _read_printed(path: Path, run: Run) -> None:
    text = path.read_text(encoding="utf-8", errors="replace")
    run.args = {name: _literal(value) for name, value in read_arguments(text.splitlines()).items()}
    if padded := _PADDED.findall(text):
        run.args["padded_vocab_size"] = int(padded[-1])
    records = read_log(text)
    for iteration, fields in records.items():
        figures = {PRINTED[name]: float(value) for name, value in fields.items() if name in PRINTED}
        row: Row = {key: value for key, value in figures.items() if math.isfinite(value)}
        row["seconds_per_iteration"] = seconds_per_iteration(fields)
        row["guarded_layers"] = [int(layer) for layer in fields.get("guarded layers", "").split(",") if layer]
        run.rows[iteration] = row
    if any("l1 coefficient after the update" in fields for fields in records.values()):
        _split_experts(run.args)
    for name, iteration, loss in _VALIDATION.findall(text):
        run.evaluated(name, int(iteration), float(loss))


def _split_experts(args: dict[str, Any]) -> None:
    """As the fork does behind the arguments that it prints; nothing where it has printed none."""
    if not {"num_experts", "moe_router_topk"} <= args.keys():
        return
    granularity = args.get("moe_granularity", 1)
    args["num_experts"] *= granularity
    args["moe_router_topk"] *= granularity
    args["moe_ffn_hidden_size"] = (args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"]) // granularity


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars of a TensorBoard folder; where a resumed training wrote an iteration again, the newer value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    newest: dict[str, dict[int, float]] = {}
    # A folder is read in the order of its files; each is read by itself, since reading them as one drops points.
    for file in sorted(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            newest.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return {tag: dict(sorted(values.items())) for tag, values in newest.items()}


def _read_tensorboard(folder: Path, run: Run) -> None:
    """By layer, what is not printed; all else only where nothing was."""
    printed = bool(run.rows)
    for tag, points in _read_scalars(folder).items():
        for iteration, value in points.items():
            if match := _LAYER.match(tag):
                row, (kind, layer, expert) = run.rows.setdefault(iteration, {}), match.groups()
                if expert is None:
                    row.setdefault(_OF_LAYERS[kind], {})[layer] = value
                else:
                    row.setdefault("tokens_per_expert", {}).setdefault(layer, {})[int(expert)] = value
            elif not printed and tag in SCALARS:
                run.rows.setdefault(iteration, {})[SCALARS[tag]] = value
            elif not printed and tag.startswith("lm loss validation") and not tag.endswith(" vs samples"):
                name = tag.removeprefix("lm loss validation").removeprefix("-")
                run.evaluated(name, iteration, value)
    for row in run.rows.values():
        for layer, shares in row.get("tokens_per_expert", {}).items():
            row["tokens_per_expert"][layer] = [shares[expert] for expert in sorted(shares)]
