"""Change a training's command line for a rehearsal, and read its settings."""

from collections.abc import Sequence

from ...console.flags import for_a_plan, parse, without
from ...console.flags import last_value as value_of
from ...recipes.data import MADE_UP

# Nothing is saved, loaded or reported, and the number of steps is the rehearsal's: Megatron's defaults are right.
LEFT_OUT = set(
    "--save --load --pretrained-checkpoint --save-interval --ckpt-step --finetune --tensorboard-dir --wandb-project "
    "--wandb-exp-name --wandb-save-dir --wandb-entity --async-save --data-path --data-args-path --train-data-path "
    "--valid-data-path --test-data-path --per-split-data-args-path --data-cache-path --train-iters --train-samples "
    "--lr-decay-iters --lr-decay-samples --lr-warmup-iters --lr-warmup-samples --exit-interval --exit-duration-in-mins "
    "--log-interval --eval-interval --eval-iters --num-workers --mock-data --cpu "
    "--cuda-graph-warmup-steps".split()
)


def rehearsed(flags: Sequence[str], steps: int) -> list[str]:
    """Return the flags of the rehearsal: made-up tokens, `steps` steps, nothing saved."""
    kept = for_a_plan(without(flags, LEFT_OUT.__contains__))
    run = f"--mock-data --train-iters {steps} --log-interval 1 --eval-interval 1000000 --eval-iters 0 --num-workers 0"
    if value_of(kept, "--cuda-graph-impl") == "full_iteration":
        run += f" --cuda-graph-warmup-steps {steps - 1}"  # Megatron captures the last
    return [*kept, *run.split()]


def data_of(flags: Sequence[str]) -> list[str]:
    """Return the words behind --data-path; none if the launch scripts made them up."""
    words = list(parse(flags).get("--data-path", ()))
    return [] if words == [MADE_UP] else words


def number(flags: Sequence[str], name: str, default: float) -> float:
    """Return the value of a flag as a number; `default` for other text, which Megatron's parser will refuse."""
    try:
        return float(value_of(flags, name) or default)
    except ValueError:
        return default
