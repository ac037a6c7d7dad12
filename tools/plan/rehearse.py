"""Simulate a run without GPUs and report whether it starts, its memory, waits, launches, collectives and hours.

remoe rehearse --gpus 8 -- <Megatron flags>      or      REHEARSE=1 bash scripts/train_llama_978m_remoe.sh 8

PyTorch, Megatron and this project run as on a node, with a CUDA that does nothing: no GPU is used, and nothing is
trained or saved. Times come from a model; --rate sets its rates.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..console.errors import ToolError
from ..console.files import write_json
from ..console.flags import without
from ..recipes.megatron_values import child_environment, read_values
from ..recipes.process import last_error
from ..runs.running import run_tool
from . import no_op_cuda, rehearsal_report
from .gpus import GPUS, complete_flags, machine_parser, parse_machine
from .phases import TITLES, experts_by_phase
from .step_time import rates, read_rate

PROGRESS = "rehearsal:"
MOST_STEPS = 6  # the most that `rank_entry.choose_steps` returns
LINES_OF_ERROR = 12  # last lines of the output, shown if the program has printed no error
# Flags to drop: a rehearsal uses mock data, saves, loads and reports nothing, and sets the number of steps.
LEFT_OUT = set(
    "--save --load --pretrained-checkpoint --save-interval --ckpt-step --finetune --tensorboard-dir --wandb-project "
    "--wandb-exp-name --wandb-save-dir --wandb-entity --async-save --data-path --data-args-path --train-data-path "
    "--valid-data-path --test-data-path --per-split-data-args-path --data-cache-path --train-iters --train-samples "
    "--lr-decay-iters --lr-decay-samples --lr-warmup-iters --lr-warmup-samples --lr-wsd-decay-iters "
    "--lr-wsd-decay-samples --exit-interval --exit-duration-in-mins --log-interval --eval-interval --eval-iters "
    "--num-workers --mock-data --cpu --full-validation --multiple-validation-sets --validation-set-names".split()
)


def rehearsal_flags(flags: Sequence[str], values: argparse.Namespace, steps: int) -> list[str]:
    """Return a run's `flags` with mock data, `steps` steps and nothing saved; `values` are the values of `flags`."""
    kept = complete_flags(without(flags, LEFT_OUT), values)
    run = f"--mock-data --train-iters {steps} --log-interval 1 --eval-interval 1000000 --eval-iters 0 --num-workers 0"
    return [*kept, *run.split(), "--lr-wsd-decay-iters", "1"]  # needed by WSD


def choose_ranks(stages: int, world: int) -> dict[int, str]:
    """Return rank → description, for the first rank of the first, a middle and the last pipeline stage."""
    chosen = sorted({0, stages // 2, stages - 1})
    return {stage * world // stages: f"pipeline stage {stage + 1} of {stages}" for stage in chosen}


def simulate(rank: int, options: argparse.Namespace, flags: Sequence[str], folder: Path) -> dict[str, Any]:
    """Simulate a rank with Megatron's `flags`. Return its record, extended by "rank", "starts" and "error"."""
    record, lines = folder / f"rank{rank}.json", list[str]()
    request = {"rank": rank, "world": options.gpus, "gpus_per_node": options.gpus_per_node, "record": str(record)}
    request |= {"stage": options.stage, "rates": options.rates}
    environment = child_environment() | no_op_cuda.environment(options.gpu, options.gpus_per_node)
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-P", "-m", f"{__package__}.rank_entry", json.dumps(request)]
    process = subprocess.Popen(
        [*command, *flags], env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith(PROGRESS):
                print(line, end="", file=sys.stderr, flush=True)
    figures = json.loads(record.read_text()) if record.exists() else {"stages": {}}
    starts = process.returncode == 0 and "roofline" in figures
    end = f"exit code {process.returncode}; the end of its output:\n{''.join(lines[-LINES_OF_ERROR:])}"
    error = None if starts else last_error("".join(lines)) or end.rstrip()
    return figures | {"rank": rank, "starts": starts, "error": error}


def rehearse(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Simulate the ranks one after another and print the figures; return 1 if the run does not start."""
    values = read_values(flags)
    if values.num_experts and values.moe_token_dispatcher_type == "allgather":
        raise ToolError(
            "--moe-token-dispatcher-type allgather, Megatron's default, cannot be rehearsed: its sizes come from the "
            "GPU. Give --moe-token-dispatcher-type alltoall."
        )
    if values.use_checkpoint_args:
        raise ToolError("--use-checkpoint-args cannot be rehearsed: nothing is loaded. Give the model's flags instead.")
    if options.stage and options.stage not in (phases := experts_by_phase(values)):
        raise ToolError(f"--stage {options.stage}: this run has only {', '.join(phases)}.", "REMOE-E501")
    simulated = rehearsal_flags(flags, values, MOST_STEPS)
    batch = read_values(simulated).global_batch_size if values.train_samples else None
    options.iterations = values.train_iters or (values.train_samples // batch if batch else 0)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rank, kind in choose_ranks(values.pipeline_model_parallel_size, options.gpus).items():
            print(f"{PROGRESS} {options.gpus} x {options.gpu}, {kind}: starting", file=sys.stderr, flush=True)
            records.append({"kind": kind} | simulate(rank, options, simulated, Path(folder)))
            if not records[-1]["starts"]:
                break
    figures = rehearsal_report.summarize(records, options)
    print("\n".join(rehearsal_report.write_lines(figures, options)))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, figures)
    return 0 if figures["starts"] else 1


def main(arguments: Sequence[str]) -> int:
    """Return the exit code: 0, 1 if the run does not start or cannot be rehearsed, 130 after an interruption."""
    parser = machine_parser("rehearse", __doc__)
    text = "set a rate of the time model: products, grouped, attention (TFLOP/s), bandwidth (TB/s), link, network "
    text += "(GB/s), smallest, latency, network_latency, frame, launch (microseconds)"
    parser.add_argument("--rate", type=read_rate, action="append", default=[], metavar="NAME=VALUE", help=text)
    text = "rehearse only this phase of ReMoE's training (default: all, in order; launches and times are the last's)"
    parser.add_argument("--stage", choices=TITLES, help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    options, flags = parse_machine(parser, arguments)
    options.rates = rates(GPUS[options.gpu]) | dict(options.rate)
    return run_tool("rehearse", lambda: rehearse(options, flags))
