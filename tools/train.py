"""Train a model of the paper with Megatron.

The script's name says which: its size, and dense, top-k (moe) or ReLU routing (remoe). The defaults are the paper's
settings. Anything after -- is passed to Megatron and overrides the script.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.remoe.files.errors import with_code

from .console.errors import ToolError
from .console.flags import split
from .console.places import LOG
from .recipes.data import is_set
from .recipes.launch import Launch, make_launch, read_recipe
from .recipes.models import PAPER, ROUTINGS
from .recipes.process import run_training

ARGUMENTS = {"dense": "[ffn_expansion]", "moe": "[num_experts] [granularity]", "remoe": "[num_experts] [granularity]"}
ENVIRONMENT = """\
Environment variables; only the data is required:
  DATA_PATH      prefixes of the data (of .bin/.idx), each after its weight; one per line if they contain blanks.
                 Without weights, several are weighted by their size
  DATA_DIR       a folder, instead of DATA_PATH: the Pile's shards 01 to 29 if it has them, else every *_document.bin,
                 with equal weights
  VOCAB_FILE, MERGE_FILE   GPT-2's encoder.json and vocab.bpe, or gpt2-vocab.json and gpt2-merges.txt (default: in
                 DATA_DIR, or in the folder above it)
  MODEL          Megatron's class: gpt (GPTModel, the default) or hybrid (HybridModel)
  TP, PP, EP, CP           tensor, pipeline, expert and context parallel sizes (default: 1)
  VPP            virtual stages of each pipeline rank (default: 1)
  NNODES or SLURM_NNODES   number of nodes (default: 1); with more: NODE_RANK, RANK or SLURM_NODEID; MASTER_ADDR;
                 MASTER_PORT (default: 29500)
  KERNELS=triton use Triton kernels; not tested on a GPU yet
  OUTPUT_DIR     folder for the checkpoints, scalars and log of the run (default: runs/<name>)
  WANDB_API_KEY  if set, metrics also go to Weights & Biases
  CUDA_DEVICE_MAX_CONNECTIONS, PYTORCH_CUDA_ALLOC_CONF   set for GPUs, unless you set them
  GOMP_SPINCOUNT set to 1000 with --cpu, unless you set it or OMP_WAIT_POLICY
  PYTHON         the interpreter (default: .venv's, else python3)
  DRY_RUN=1      print the cost of the run on GPUs, and the command; DRY_RUN=command: only the command
  REHEARSE=1     simulate the run without GPUs: whether it starts, its memory, waits, launches and time
  GPU            kind of GPU for both (default: h100)
  REHEARSE_JSON  a file for the rehearsal's numbers
"""


def usage(size: str = "SIZE", routing: str = "remoe") -> str:
    """Return the text of a launch script's --help."""
    arguments = f"[gpus_per_node] [train_iters] [micro_batch_size] {ARGUMENTS[routing]} [project_name]"
    script = f"bash scripts/train_llama_{size}_{routing}.sh"
    usage = f"usage: remoe train {size} {routing} {arguments} [-- Megatron flags]"
    return f"{usage}\n    or {script} with the same arguments\n\n{__doc__}\n{ENVIRONMENT}"


def main(words: Sequence[str]) -> int:
    """Run a launch script, given size, routing and the script's arguments; return the exit code."""
    if len(words) < 2 or words[0] not in PAPER or words[1] not in ROUTINGS:
        if {"-h", "--help"} & set(words):
            print(usage(), end="")
            return 0
        given = f"{' '.join(words[:2])!r}: " if words else ""
        wanted = f"give one of {', '.join(PAPER)} and one of {', '.join(ROUTINGS)}"
        print(f"error: {given}{wanted}. remoe train --help explains both.", file=sys.stderr)
        return 2
    size, routing, *arguments = words
    if {"-h", "--help"} & set(split(arguments)[0]):
        print(usage(size, routing), end="")
        return 0
    try:
        launch = make_launch(read_recipe(size, routing, arguments, os.environ), os.environ)
        for note in launch.notes:
            print(note, file=sys.stderr)
        if is_set(os.environ, "DRY_RUN"):
            return show(launch)
        if is_set(os.environ, "REHEARSE"):
            return rehearse(launch)
        return train(launch)
    except ToolError as error:
        print(f"error: {with_code(error)}", file=sys.stderr)
        return error.exit_code


def show(launch: Launch) -> int:
    """Print the cost of the run, unless DRY_RUN=command, and its command; return the exit code."""
    if os.environ["DRY_RUN"] != "command":
        from .plan.cost import main as cost

        if code := cost([*machine_flags(launch), "--", *launch.flags]):
            return code
        print("\nCommand:")
    print(launch.text(), end="")
    return 0


def machine_flags(launch: Launch) -> list[str]:
    """Return the flags of `remoe cost` and `remoe rehearse` for the launch's machine."""
    nodes, gpus, gpu = launch.layout.nodes, launch.layout.gpus_per_node, os.environ.get("GPU") or "h100"
    return ["--gpus", str(nodes * gpus), "--gpus-per-node", str(gpus), "--gpu", gpu]


def rehearse(launch: Launch) -> int:
    """Simulate the run and return the exit code of `remoe rehearse`."""
    os.environ.update(launch.settings)
    from .plan.rehearse import main as rehearsal

    numbers = ["--json", os.environ["REHEARSE_JSON"]] if os.environ.get("REHEARSE_JSON") else []
    return rehearsal([*machine_flags(launch), *numbers, "--", *launch.flags])


def train(launch: Launch) -> int:
    """Train and return the exit code. Each node writes its command and its output to a log in the run's folder."""
    output, node = Path(launch.output), launch.layout.node_rank(os.environ)
    log = output / (f"train.node{node}.log" if node else LOG)  # a shared disk can lose lines that two nodes append
    print(f"Run: {output} (log, checkpoints, tensorboard)", flush=True)
    return run_training(launch.command, log, launch.text())
