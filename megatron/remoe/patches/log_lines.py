"""The lines of the training log for more than the console."""

import logging
from functools import wraps

from megatron.training import training


def run_logger() -> logging.Logger:
    """Carries those lines (str), and what this package adds to them (dict)."""
    logger = logging.getLogger("megatron.remoe.run")
    logger.propagate = False  # --logging-level would print every line twice
    return logger


def tell_what_is_printed() -> None:
    """Hand the lines of the training log and of evaluations to Python's logging too, on every rank.

    What Megatron gives to TensorBoard's writer is of one step, at other intervals and without the time that it took;
    the mean loss of a log interval goes to the console alone.
    """
    print_rank_last = training.print_rank_last
    if hasattr(print_rank_last, "__wrapped__"):
        return
    logger = run_logger()

    @wraps(print_rank_last)
    def print_and_tell(message: str) -> None:
        print_rank_last(message)
        logger.info(message)

    training.print_rank_last = print_and_tell
