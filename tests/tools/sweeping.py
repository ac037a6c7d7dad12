"""Run the sweep in this process, and write the files of runs that were never trained."""

import argparse
import json
from pathlib import Path

from tests.scripts.launching import in_process
from tools.experiments.run import Run, Text
from tools.experiments.run_folders import STAMP, Grid, RunFolder, make_run_folder, write_json
from tools.experiments.sweep import main
from tools.recipes.models import Routing, Size
from tools.recipes.tiny import SIZE

TEXT = Text(Path("text"), {"code": 30, "docs": 10}, "text", {"code": 1.0, "docs": 1.0, "": 1.0})


def sweep(*arguments: str, code: int = 0, **environment: str) -> tuple[str, str]:
    """Run a sweep in this process, assert its exit code, and return its output and errors."""
    result = in_process(main, [*arguments], "/", environment)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout, result.stderr


def line(iteration: int, seconds: float = 0.1, **more: object) -> dict[str, object]:
    """Return a record of metrics.jsonl at a log interval, with 4 sequences per step."""
    step = {"consumed_samples": 4 * iteration, "seconds_per_iteration": seconds, "global_batch_size": 4}
    return {"kind": "log", "iteration": iteration} | step | more


def final(iteration: int, loss: float, **more: object) -> dict[str, object]:
    return {"kind": "validation", "iteration": iteration, "lm_loss": loss, "final": True} | more


def write_metrics(folder: Path, args: dict[str, object], *records: dict[str, object] | str) -> Path:
    """Write metrics.jsonl: a start record with `args`, then `records` (dicts or raw lines); return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    start = {"kind": "start", "time": 0.0, "iteration": 0, "args": args}
    lines = (record if isinstance(record, str) else json.dumps(record) for record in (start, *records))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def write_run(folder: Path, train_iters: int, *records: dict[str, object], **args: object) -> None:
    """Write the metrics of a run into `folder`/checkpoints."""
    args = {"train_iters": train_iters, "seq_length": 64, "global_batch_size": 4} | args
    write_metrics(folder / "checkpoints", args, *records)


def model_arguments(size: Size, routing: Routing, vocabulary: int) -> argparse.Namespace:
    """Return a recipe's arguments that FLOPs depend on, under Megatron's names.

    Args:
        size: the model's dimensions.
        routing: dense or routed layers; granularity G multiplies experts and k, and divides the experts' width.
        vocabulary: number of tokens before Megatron pads it.
    """
    has_experts, multiple = routing.kind != "dense", size.vocabulary_multiple
    return argparse.Namespace(
        num_layers=size.layers, hidden_size=size.hidden, num_attention_heads=size.heads, swiglu=True,
        ffn_hidden_size=size.ffn, group_query_attention=True, num_query_groups=size.query_groups,
        seq_length=size.sequence, num_experts=routing.experts * routing.granularity if has_experts else None,
        moe_router_topk=routing.topk * routing.granularity, moe_ffn_hidden_size=size.ffn // routing.granularity,
        padded_vocab_size=-(-vocabulary // multiple) * multiple,
    )  # fmt: skip


def finish_run(grid: Grid, run: Run, loss: float = 2.0, **args: object) -> RunFolder:
    """Write the metrics and the stamp of a finished run; return its folder."""
    folder = make_run_folder(run, grid)
    losses = [final(run.steps, loss, set=name, tokens=100) for name in TEXT.train_tokens]
    logged = range(5, run.steps + 1, 5)
    steps = [line(at, lm_loss=2.0, total_active_pairs=150 * at, total_layer_tokens=100 * at) for at in logged]
    known = vars(model_arguments(SIZE, Routing(run.routing, run.experts), 257))
    write_run(folder.path, run.steps, *steps, *losses, **known, validation_set_names=[*TEXT.train_tokens], **args)
    write_json(folder.path / STAMP, folder.stamp)
    return folder
