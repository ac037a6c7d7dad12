"""A run's Megatron flags: as its command.sh says it was started, and as it would be started now."""

import itertools
import math
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..common.flags import GPT2_WORDS, Settings, parse
from ..common.log_reader import read_arguments
from .errors import SettingsError
from .plan import Launch, Run

PRINTED_WITHIN = 5000  # lines

ENTRY = "pretrain_gpt.py"
LAYOUT = ("TP", "PP", "VPP", "EP", "CP", "NNODES")
# What says where a run leaves its files, when it stops, or what the machine is: no part of the result.
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
    "--train-iters": "give it in front of --",
    "--micro-batch-size": "give it in front of --",
    "--num-experts": "choose with --experts",
    "--moe-granularity": "choose with --granularities",
    "--moe-relu-routing": "choose with --routings",
    "--save": "choose with --output-dir",
    "--load": "choose with --output-dir",
    "--tensorboard-dir": "choose with --output-dir",
}
PATTERN = "--hybrid-layer-pattern"
DIMENSIONS = ("--num-layers", PATTERN, "--hidden-size", "--ffn-hidden-size", "--moe-ffn-hidden-size")
ADAPTED = ("--lr", "--min-lr", "--ffn-hidden-size", PATTERN)  # of which runs take what is given, and change it
SHOWN = 4  # differences that a message names


def whole(settings: Settings, flag: str) -> int:
    """The number behind a flag, 0 where there is none."""
    values = settings.get(flag, ())
    return int(values[0]) if values and values[0].isdecimal() else 0


def of_command(text: str) -> Settings | None:
    """The settings of a shell command that starts the entry, without the launcher's; None for any other text."""
    words = _entrys_words(text)
    return None if words is None else parse(words)


def _entrys_words(text: str) -> list[str] | None:
    try:
        words = shlex.split(text)
    except ValueError:
        return None
    entry = next((place for place, word in enumerate(words) if word.endswith(ENTRY)), None)
    return None if entry is None else words[entry + 1 :]


def flags_of(folder: Path) -> list[str]:
    """The words behind the entry in command.sh; none where it does not exist."""
    return _entrys_words(_command(folder)) or []


def started_with(folder: Path) -> Settings | None:
    """What the launch script last started the run in `folder` with; None where it never did."""
    return of_command(_command(folder))


def settings_of(folder: Path) -> Settings | None:
    """The same, or the arguments in the log of a run that was started otherwise, for instance in the authors' fork."""
    return started_with(folder) or _printed(folder)


def _printed(folder: Path) -> Settings | None:
    try:
        with (folder / "train.log").open(encoding="utf-8", errors="replace") as file:
            found = read_arguments(itertools.islice(file, PRINTED_WITHIN))
    except FileNotFoundError:
        return None
    return {f"--{name.replace('_', '-')}": (value,) for name, value in found.items()} or None


def would_start_with(launch: Launch, run: Run, anywhere: bool) -> Settings:
    """What the launch script would start now.

    Args:
        launch: what all runs have in common.
        run: the run.
        anywhere: leave the layout out, which is checked where the run starts, on machines that are not this one.

    Raises:
        SettingsError: the script refuses its arguments or environment.
    """
    # PYTHON: the script would import Transformer Engine, for flags that are not compared.
    environment = os.environ | launch.environment(run, os.environ) | {"DRY_RUN": "command", "PYTHON": "true"}
    if anywhere:
        environment = {name: value for name, value in environment.items() if name not in LAYOUT}
    script = subprocess.run(
        ["bash", *launch.arguments(run)], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if script.returncode:
        raise SettingsError(f"{run.name}: {script.stderr.strip().removeprefix('error: ')}")
    settings = of_command(script.stdout)
    if settings is None:
        raise SettingsError(f"{run.name}: DRY_RUN=command {launch.arguments(run)[0]} printed no command of {ENTRY}.")
    return settings


def check_flags(flags: tuple[str, ...], runs: Sequence[Run]) -> None:
    """Refuse flags behind -- that the sweep sets itself, for each run or for some of `runs`.

    Raises:
        SettingsError: with the flag and the remedy.
    """
    given = parse(flags)
    for flag in given:
        if flag in SET_BY_SWEEP:
            raise SettingsError(f"{flag} behind --: the sweep sets it for each run; {SET_BY_SWEEP[flag]}.")
        if flag in ADAPTED:
            continue
        if run := next((run for run in runs if flag in run.flags(given)), None):
            raise SettingsError(f"{flag} behind --: the sweep sets it for {run.name}. Leave out the flag, or that run.")


def check_evaluation(settings: Settings) -> None:
    """Refuse settings under which no run would ever have the final validation loss that makes it finished.

    Raises:
        SettingsError: with the flag, its value and the remedy.
    """
    if not whole(settings, "--eval-iters") and "--full-validation" not in settings:
        given = " ".join(settings.get("--eval-iters", ()))
        raise SettingsError(f"--eval-iters {given}: no validation loss at the end. Give a number of at least 1.")
    if "--multiple-validation-sets" in settings:
        raise SettingsError("--multiple-validation-sets: the sweep compares one validation loss. Leave it out.")
    split = " ".join(settings.get("--split", ()))
    shares = split.split(",")
    if len(shares) < 2 or not shares[1].strip(" 0."):
        raise SettingsError(f"--split {split}: nothing is left for validation. Give its second number a share.")


def differences(then: Settings, now: Settings) -> str:
    """What differs, in words; empty where the results of both are comparable."""
    told = []
    then, now = _in_one_stage(then), _in_one_stage(now)
    for flag in sorted((then.keys() | now.keys()) - NOT_COMPARED):
        if then.get(flag) != now.get(flag):
            told.append(f"{flag} was {_shown(then.get(flag))} and is now {_shown(now.get(flag))}")
    return "; ".join(told[:SHOWN]) + (f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else "")


def _in_one_stage(settings: Settings) -> Settings:
    """HybridModel's pattern without the marks of pipeline stages, which are the layout's."""
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
    """The number of processes, one a GPU, that command.sh starts on all nodes; 0 where it does not exist."""
    launcher, entry, _ = _command(folder).partition(ENTRY)
    if not entry:
        return whole(_printed(folder) or {}, "--world-size")
    settings = parse(launcher.split())
    return whole(settings, "--nproc-per-node") * whole(settings, "--nnodes")


def is_resized(folder: Path) -> bool:
    """Whether flags behind -- gave the model other dimensions than its launch script does."""
    words = _command(folder).split()
    return any(words.count(flag) > 1 for flag in DIMENSIONS)


def tokens_per_iteration(settings: Settings) -> int:
    """Tokens of a global batch."""
    return whole(settings, "--global-batch-size") * whole(settings, "--seq-length")


def flops(settings: Settings) -> float:
    """Training FLOPs of a whole run with k experts per token, counted as tools/cost counts them."""
    sizes = ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "seq-length")
    layers, hidden, ffn, heads, groups, sequence = (whole(settings, f"--{name}") for name in sizes)
    layers = layers or "".join(settings.get(PATTERN, ())).count("*")
    ffn = (whole(settings, "--moe-ffn-hidden-size") or ffn) * max(1, whole(settings, "--moe-router-topk"))
    multiple = whole(settings, "--make-vocab-size-divisible-by") or 128
    vocabulary = math.ceil((whole(settings, "--vocab-size") or GPT2_WORDS) / multiple) * multiple
    attention = 2 * hidden * (hidden + hidden * (groups or heads) // max(1, heads) + sequence)
    matrices = layers * (attention + 3 * hidden * ffn) + hidden * vocabulary
    return 6.0 * whole(settings, "--train-iters") * tokens_per_iteration(settings) * max(1, matrices)
