"""Print the commands that train runs with the launch scripts of the paper's models."""

import math
import os
import shlex
from argparse import Namespace
from collections.abc import Sequence

from ..console.places import ROOT, is_clone
from ..recipes.layout import RecipeError
from ..recipes.models import Training
from .run import RATES, Run, check_flags


def print_commands(runs: Sequence[Run], args: Namespace) -> None:
    """Print a line for a shell for each run: the call of its launch script.

    Args:
        runs: the runs to train.
        args: the command line of `remoe sweep`: the folder of all runs, GPUs per node, micro-batch size and flags.

    Raises:
        RecipeError: there are no launch scripts, or a flag after -- is one that the runs set.
    """
    if not is_clone():
        raise RecipeError("launch scripts need a clone of the project. Run this there, or give --tiny.")
    check_flags(args.flags, runs)
    for run in runs:
        variables = [f"OUTPUT_DIR={args.output_dir / run.name}"]
        experts, parallel = run.experts * run.granularity, os.environ.get("EP", "")
        if experts and parallel.isdecimal() and experts % int(parallel):
            variables.append(f"EP={math.gcd(int(parallel), experts)}")  # EP has to divide the experts
        sizes = [run.experts, run.granularity] if run.experts else [run.expansion]
        words = [args.gpus_per_node, run.steps, args.micro_batch_size or "", *sizes, "--", *run.added_flags()]
        if run.rate != 1:
            words += [word for pair in zip(RATES, run.rates(Training()), strict=True) for word in pair]
        words += ["--seed", run.seed, *run.fitting(args.flags)]
        script = ROOT / "scripts" / f"train_llama_{run.size}_{run.routing}.sh"
        print(shlex.join(["env", *variables, "bash", str(script), *map(str, words)]))
