"""What a rehearsal changes in a training's command line, and what it reads from it."""

from collections.abc import Sequence
from pathlib import Path

from ..common.flags import OF_GPT2S_SIZE, parse, without

# Nothing is saved, loaded or reported, and the number of steps is the rehearsal's: Megatron's defaults are right.
LEFT_OUT = set(
    "--save --load --pretrained-checkpoint --save-interval --ckpt-step --finetune --tensorboard-dir --wandb-project "
    "--wandb-exp-name --wandb-save-dir --wandb-entity --async-save --data-path --data-args-path --train-data-path "
    "--valid-data-path --test-data-path --per-split-data-args-path --data-cache-path --train-iters --train-samples "
    "--lr-decay-iters --lr-decay-samples --lr-warmup-iters --lr-warmup-samples --exit-interval --exit-duration-in-mins "
    "--log-interval --eval-interval --eval-iters --num-workers --rampup-batch-size --mock-data --cpu".split()
)
GPT2S = {"--tokenizer-type", "--vocab-file", "--merge-file"}
MADE_UP = "made-up"  # what scripts/lib/data.sh says for data where it was given none


def rehearsed(flags: Sequence[str], steps: int) -> list[str]:
    """The flags of the training as it is rehearsed: made-up tokens, `steps` steps, nothing saved."""
    kept = without(flags, LEFT_OUT.__contains__)
    if value_of(kept, "--tokenizer-type") in (None, "GPT2BPETokenizer"):
        files = [value_of(kept, flag) for flag in ("--vocab-file", "--merge-file")]
        if not all(file and Path(file).is_file() for file in files):
            kept = [*without(kept, GPT2S.__contains__), *OF_GPT2S_SIZE]
    run = f"--mock-data --train-iters {steps} --log-interval 1 --eval-interval 1000000 --eval-iters 0 --num-workers 0"
    return [*kept, *run.split()]


def data_of(flags: Sequence[str]) -> list[str]:
    """The words behind --data-path; none where the launch scripts made them up."""
    words = list(parse(flags).get("--data-path", ()))
    return [] if words == [MADE_UP] else words


def value_of(flags: Sequence[str], name: str) -> str | None:
    """The last value given to a flag; None where it is not given."""
    places = [place for place, word in enumerate(flags[:-1]) if word == name]
    if places:
        return flags[places[-1] + 1]
    return next((word.split("=", 1)[1] for word in reversed(flags) if word.startswith(f"{name}=")), None)


def number(flags: Sequence[str], name: str, default: float) -> float:
    """The value of a flag that is a number; what is none is left to Megatron's parser to complain of."""
    try:
        return float(value_of(flags, name) or default)
    except ValueError:
        return default
