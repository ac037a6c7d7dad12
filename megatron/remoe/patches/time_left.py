"""The time left, in the line that Megatron prints at each log interval."""

import re
from functools import wraps

from megatron.training import get_args, training

_LINE = re.compile(r" iteration +(\d+)/ *(\d+) \|.* elapsed time per iteration \(ms\): ([\d.]+) \|")


def print_time_left() -> None:
    """Append the hours left, by the interval's time per step.

    The line of a start's first step, which is slower, gets none unless every step has a line.
    """
    print_rank_last = training.print_rank_last
    if hasattr(print_rank_last, "__wrapped__"):
        return

    @wraps(print_rank_last)
    def printing(message: str) -> None:
        found = _LINE.search(message)
        if found and int(found[1]) % get_args().log_interval == 0:
            hours = (int(found[2]) - int(found[1])) * float(found[3]) / 3.6e6
            message += f" time left (h): {hours:.2f} |"
        print_rank_last(message)

    training.print_rank_last = printing
