"""A run's Megatron flags: as its command.sh has them, and as they would be now."""

import itertools
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..common.flags import Settings, parse
from ..common.log_reader import read_arguments
from ..recipes.flops import arguments_of, flops_per_sequence
from ..recipes.launch import plan
from ..recipes.layout import NAMES, RecipeError
from .plan import Launch, Run

PRINTED_WITHIN = 5000  # lines

ENTRY = "pretrain_gpt.py"
LAYOUT = (*NAMES, "NNODES")
# Places, intervals, layout and hardware, which do not change the result.
NOT_COMPARED = frozenset(
    """
    --save --load --save-interval --tensorboard-dir --wandb-project --wandb-exp-name --wandb-save-dir
    --log-interval --exit-interval --exit-duration-in-mins
    --tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size --expert-model-parallel-size
    --num-virtual-stages-per-pipeline-rank --sequence-parallel
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --transformer-impl --moe-grouped-gemm --no-persist-layer-norm --no-gradient-accumulation-fusion
    --moe-kernels --cross-entropy-loss-fusion --ddp-average-in-collective
    --no-masked-softmax-fusion --no-rope-fusion
    """.split()
)
SET_BY_SWEEP = {
    **dict.fromkeys(("--train-iters", "--micro-batch-size"), "give it in front of --"),
    **dict.fromkeys(("--save", "--load", "--tensorboard-dir"), "choose with --output-dir"),
    "--num-experts": "choose with --experts",
    "--moe-granularity": "choose with --granularities",
    "--moe-relu-routing": "choose with --routings",
}
PATTERN = "--hybrid-layer-pattern"
DIMENSIONS = ("--num-layers", PATTERN, "--hidden-size", "--ffn-hidden-size", "--moe-ffn-hidden-size")
ADAPTED = ("--lr", "--min-lr", "--ffn-hidden-size", PATTERN)  # runs start from the given value and change it
SHOWN = 4  # differences that a message names


def whole(settings: Settings, flag: str) -> int:
    """Return the number behind a flag, 0 if there is none."""
    values = settings.get(flag, ())
    return int(values[0]) if values and values[0].isdecimal() else 0


def of_command(text: str) -> Settings | None:
    """Return Megatron's flags in a shell command that starts a training; None for any other text."""
    try:
        words = shlex.split(text)
    except ValueError:
        return None
    entry = next((place for place, word in enumerate(words) if word.endswith(ENTRY)), None)
    return None if entry is None else parse(words[entry + 1 :])


def started_with(folder: Path) -> Settings | None:
    """Return the flags with which a launch script last started the run in `folder`; None if it never did."""
    return of_command(_command(folder))


def settings_of(folder: Path) -> Settings | None:
    """Return the same, or the arguments in the log of a run of another program, such as the authors' fork."""
    return started_with(folder) or _printed(folder)


def _printed(folder: Path) -> Settings | None:
    try:
        with (folder / "train.log").open(encoding="utf-8", errors="replace") as file:
            found = read_arguments(itertools.islice(file, PRINTED_WITHIN))
    except FileNotFoundError:
        return None
    return {f"--{name.replace('_', '-')}": (value,) for name, value in found.items()} or None


def would_start_with(launch: Launch, run: Run, anywhere: bool) -> Settings:
    """Return the flags with which the launch script would start the run now.

    Args:
        launch: what all runs have in common.
        run: the run.
        anywhere: ignore the layout, which is checked where the run starts, on other machines than this.

    Raises:
        RecipeError: an argument or environment variable is wrong.
    """
    environment = os.environ | launch.environment(run, os.environ) | {"DRY_RUN": "command"}
    environment = {name: value for name, value in environment.items() if not (anywhere and name in LAYOUT)}
    try:
        planned = plan(run.size, run.routing, launch.words(run), environment, ask_for_packages=False)
    except RecipeError as error:
        raise RecipeError(f"{run.name}: {error}") from error
    return parse(planned.flags)


def check_flags(flags: tuple[str, ...], runs: Sequence[Run]) -> None:
    """Refuse flags behind -- that the sweep sets itself, for each run or for some of `runs`.

    Raises:
        RecipeError: with the flag and the remedy.
    """
    given = parse(flags)
    for flag in given:
        if flag in SET_BY_SWEEP:
            raise RecipeError(f"{flag} behind --: the sweep sets it for each run; {SET_BY_SWEEP[flag]}.")
        if flag in ADAPTED:
            continue
        if run := next((run for run in runs if flag in run.flags(given)), None):
            raise RecipeError(f"{flag} behind --: the sweep sets it for {run.name}. Leave out the flag, or that run.")


def check_evaluation(settings: Settings) -> None:
    """Refuse settings under which no run would ever have the final validation loss that finishes it.

    Raises:
        RecipeError: with the flag, its value and the remedy.
    """
    if not whole(settings, "--eval-iters") and "--full-validation" not in settings:
        given = " ".join(settings.get("--eval-iters", ()))
        raise RecipeError(f"--eval-iters {given}: no validation loss at the end. Give a number of at least 1.")
    if "--multiple-validation-sets" in settings:
        raise RecipeError("--multiple-validation-sets: the sweep compares one validation loss. Leave it out.")
    split = " ".join(settings.get("--split", ()))
    shares = split.split(",")
    if len(shares) < 2 or not shares[1].strip(" 0."):
        raise RecipeError(f"--split {split}: nothing is left for validation. Give its second number a share.")


def differences(then: Settings, now: Settings) -> str:
    """Return what differs, in words; empty if the results of both compare."""
    then, now = _in_one_stage(then), _in_one_stage(now)
    found = [
        f"{flag} was {_shown(then.get(flag))} and is now {_shown(now.get(flag))}"
        for flag in sorted((then.keys() | now.keys()) - NOT_COMPARED)
        if then.get(flag) != now.get(flag)
    ]
    return "; ".join(found[:SHOWN]) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _in_one_stage(settings: Settings) -> Settings:
    """Return the settings with HybridModel's pattern without the marks of pipeline stages."""
    pattern = {flag: tuple(word.replace("|", "") for word in settings[flag]) for flag in {PATTERN} & settings.keys()}
    return settings | pattern


def _command(folder: Path) -> str:
    try:
        return (folder / "command.sh").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _shown(values: tuple[str, ...] | None) -> str:
    return "not given" if values is None else " ".join(values) or "given"


def processes(folder: Path) -> int:
    """Return the number of processes that command.sh starts on all nodes; 0 if it does not exist."""
    launcher, entry, _ = _command(folder).partition(ENTRY)
    if not entry:
        return whole(_printed(folder) or {}, "--world-size")
    settings = parse(launcher.split())
    return whole(settings, "--nproc-per-node") * whole(settings, "--nnodes")


def is_resized(folder: Path) -> bool:
    """Return whether flags behind -- gave the model other dimensions than its launch script does."""
    words = _command(folder).split()
    return any(words.count(flag) > 1 for flag in DIMENSIONS)


def tokens_per_iteration(settings: Settings) -> int:
    """Return the tokens of a global batch."""
    return whole(settings, "--global-batch-size") * whole(settings, "--seq-length")


def flops(settings: Settings) -> float:
    """Return the training FLOPs of a whole run with k experts per token.

    Raises:
        RecipeError: the model has layers whose FLOPs are not counted.
    """
    try:
        sequence = flops_per_sequence(arguments_of(settings))
    except ValueError as error:
        raise RecipeError(f"{PATTERN} {' '.join(settings.get(PATTERN, ()))}: {error}.") from error
    return whole(settings, "--train-iters") * whole(settings, "--global-batch-size") * sequence
