"""Compare the flags with which runs were started and would be now, to find what is left to train."""

import os
import shlex
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...console.flags import Settings, above_zero, parse, whole, whole_number
from ...recipes.flops import arguments_of, flops_per_sequence
from ...recipes.hardware import GPU_FLAGS, PLAIN_PYTORCH, TRITON
from ...recipes.launch import plan
from ...recipes.layout import NAMES, RecipeError
from ...recipes.models import PAPER, Routing
from ...runs.figure_reader import LOG, METRICS
from . import slurm
from .plan import Launch, Run
from .run_log import Outcome, read_outcome

ENTRY = "pretrain_gpt.py"
LAYOUT = (*NAMES, "NNODES")
# Places, intervals, layout and hardware, which do not change the result.
NOT_COMPARED = {
    *parse([*GPU_FLAGS, *PLAIN_PYTORCH, *TRITON]),
    *"""
    --save --load --save-interval --tensorboard-dir --wandb-project --wandb-exp-name --wandb-save-dir
    --log-interval --exit-interval --exit-duration-in-mins
    --tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size --expert-model-parallel-size
    --num-virtual-stages-per-pipeline-rank --sequence-parallel
    --moe-grouped-gemm --no-gradient-accumulation-fusion --no-rope-fusion
    """.split(),
}
SET_BY_SWEEP = {
    **dict.fromkeys(("--train-iters", "--micro-batch-size"), "give it in front of --"),
    **dict.fromkeys(("--save", "--load", "--tensorboard-dir"), "choose with --output-dir"),
    "--num-experts": "choose with --experts",
    "--moe-granularity": "choose with --granularities",
    "--moe-relu-routing": "choose with --routings",
}
PATTERN = "--hybrid-layer-pattern"
# Runs start from these values and change them.
ADAPTED: dict[str, Callable[[str], object]] = {
    "--lr": above_zero, "--min-lr": float, "--ffn-hidden-size": whole_number(1), PATTERN: str
}  # fmt: skip
SHOWN, NAMED = 4, 5  # differences and runs that a message names


def started_with(folder: Path) -> Settings | None:
    """Return the flags with which a launch script last started the run in `folder`; None if it never did."""
    try:
        words = shlex.split((folder / "command.sh").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    entry = next((place for place, word in enumerate(words) if word.endswith(ENTRY)), None)
    return None if entry is None else parse(words[entry + 1 :])


def planned_flags(launch: Launch, run: Run, anywhere: bool) -> Settings:
    """Return the flags with which the launch script would start the run now.

    With `anywhere`, ignore the layout: it is checked where the run starts, on another machine.

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
    for flag in ADAPTED.keys() & given.keys():
        try:
            ADAPTED[flag](given[flag][0])
        except (ArgumentTypeError, ValueError, IndexError) as error:
            raise RecipeError(f"{flag} {shlex.join(given[flag])}: give it one value of its kind ({error}).") from error
    for flag in given:
        if flag in SET_BY_SWEEP:
            raise RecipeError(f"{flag} behind --: the sweep sets it for each run; {SET_BY_SWEEP[flag]}.")
        if flag not in ADAPTED and (run := next((run for run in runs if flag in run.flags(given)), None)):
            raise RecipeError(f"{flag} behind --: the sweep sets it for {run.name}. Leave out the flag, or that run.")


def check_evaluation(settings: Settings) -> None:
    """Refuse settings under which no run would ever have the final validation loss that finishes it.

    Raises:
        RecipeError: with the flag, its value and the remedy.
    """
    iterations, split = (" ".join(settings.get(flag, ())) for flag in ("--eval-iters", "--split"))
    if iterations in ("", "0") and "--full-validation" not in settings:
        raise RecipeError(f"--eval-iters {iterations}: no validation loss at the end. Give a number of at least 1.")
    if "--multiple-validation-sets" in settings:
        raise RecipeError("--multiple-validation-sets: the sweep compares one validation loss. Leave it out.")
    if not split.partition(",")[2].partition(",")[0].strip(" 0."):
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


def mixed_settings(output: Path, planned: Mapping[Run, Settings]) -> str:
    """Return a warning if runs differ in settings that their names do not show; empty if their results compare.

    Args:
        output: folder of runs, with the settings of their last start.
        planned: further runs, or others' next settings.
    """
    folders = sorted(path.parent for path in output.glob("*/command.sh"))
    started = ((Run.from_name(folder.name), started_with(folder)) for folder in folders)
    settings = {run: then for run, then in started if run and then} | {**planned}
    own = [_flags_of(run) for run in settings]
    differing = {flag for each in own for flag in each if any(other.get(flag) != each[flag] for other in own)}
    found = []
    for flag in sorted({*(flag for each in settings.values() for flag in each)} - differing - NOT_COMPARED - {PATTERN}):
        values = {  # dense runs get no --moe-... flags
            each.get(flag): run
            for run, each in settings.items()
            if run.routing != "dense" or not flag.startswith("--moe-")
        }
        if len(values) > 1:
            found.append(f"{flag} is " + ", ".join(f"{_shown(value)} in {run.name}" for value, run in values.items()))
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    head = f"{output} has runs with different settings, whose losses do not compare: "
    return f"{head}{'; '.join([*found[:SHOWN], *more])}." if found else ""


def _flags_of(run: Run) -> Settings:
    """Return the flags that define a run, including the launch script's."""
    size = replace(PAPER[run.size], ffn=PAPER[run.size].ffn * run.expansion)
    routing = Routing(run.routing, run.experts or 0, run.granularity or 0)
    return parse([*size.layer_flags(run.routing), *size.flags(), *routing.flags(size.ffn), *run.flags({})])


def _in_one_stage(settings: Settings) -> Settings:
    """Return the settings with HybridModel's pattern without the marks of pipeline stages."""
    pattern = {flag: tuple(word.replace("|", "") for word in settings[flag]) for flag in {PATTERN} & settings.keys()}
    return settings | pattern


def _shown(values: tuple[str, ...] | None) -> str:
    return "not given" if values is None else " ".join(values) or "given"


def tokens_per_iteration(settings: Settings) -> int:
    """Return the tokens of a global batch."""
    return whole(settings, "--global-batch-size") * whole(settings, "--seq-length")


def flops(settings: Settings) -> float:
    """Return the training FLOPs of a whole run with k experts per token.

    Raises:
        RecipeError: a layer is not counted, --moe-layer-freq is wrong, or the tokenizer is unreadable.
    """
    try:
        sequence = flops_per_sequence(arguments_of(settings))
    except ValueError as error:
        raise RecipeError(f"{error}.") from error
    return whole(settings, "--train-iters") * whole(settings, "--global-batch-size") * sequence


@dataclass(frozen=True)
class Found:
    """A run, the settings that it would start with, and its state in the output folder.

    Attributes:
        job: number of its queued or running Slurm job.
        conflict: differences to the settings of an earlier start; empty without any.
    """

    run: Run
    settings: Settings
    outcome: Outcome | None
    job: str | None
    conflict: str

    @property
    def finished(self) -> bool:
        """Return whether the run is finished."""
        return self.outcome is not None and self.outcome.finished

    @property
    def state(self) -> str:
        """Return the state as text."""
        if self.finished:
            return "finished"
        if self.job is not None:
            return f"queued or running as Slurm job {self.job}"
        if self.outcome is None:
            return "not started"
        return f"unfinished, at iteration {self.outcome.iterations} of {self.outcome.train_iters}"


def look(launch: Launch, runs: Sequence[Run], by_slurm: bool) -> list[Found]:
    """Return the state of all runs, Slurm's jobs included if `by_slurm`.

    Raises:
        RecipeError: the scripts refuse their arguments, or a run has other settings than before.
        ToolError: squeue cannot be called.
    """
    wanted = {run: planned_flags(launch, run, by_slurm) for run in runs}
    jobs = slurm.queued() if by_slurm else {}  # before the outcomes: a job may just have finished
    found = []
    for run, settings in wanted.items():
        check_evaluation(settings)
        folder, outcome = launch.folder(run), read_outcome(launch.folder(run))
        finished = outcome is not None and outcome.finished
        job = None if finished else jobs.get(str(folder))
        can_continue = (folder / "checkpoints" / "latest_checkpointed_iteration.txt").exists()
        conflict = _conflict(folder, settings) if not job and (finished or can_continue) else ""
        found.append(Found(run, settings, outcome, job, conflict))
    if lines := [f"  {each.run.name}: {each.conflict}" for each in found if each.conflict]:
        more = [f"  and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
        head = f"{launch.output} holds {len(lines)} of these runs with other settings:"
        remedy = "Give the same settings as then or another --output-dir; or remove these folders to train them again."
        raise RecipeError("\n".join([head, *lines[:NAMED], *more, remedy]))
    return found


def _conflict(folder: Path, now: Settings) -> str:
    then = started_with(folder)
    return "there is no command.sh to tell what it was trained with" if then is None else differences(then, now)


def set_aside_old_log(folder: Path, now: Settings) -> None:
    """Rename the logs of an earlier start with other settings that left no checkpoint."""
    then = started_with(folder)
    for log in (folder / LOG, folder / "checkpoints" / METRICS):
        if then is not None and differences(then, now) and log.exists():
            os.replace(log, log.with_name(f"{log.name}.old"))
