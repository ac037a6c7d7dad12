"""Model the host: it works ahead of the GPU until it has to wait for it, and then the GPU waits for the host.

Its work is counted: calls of Python functions and launches, each at a cost that cards.py has.
"""

from dataclasses import dataclass, field
from itertools import zip_longest


@dataclass
class HostWork:
    """The host's work in a step.

    Attributes:
        marks: calls of Python functions and launches so far: at the start, at each wait for the GPU, at the end.
    """

    marks: list[tuple[int, int]] = field(default_factory=list)

    def seconds(self, rates: dict[str, float]) -> list[float]:
        """Return the time of each stretch between two waits, by the rates "frame" and "launch" in microseconds."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [
            1e-6 * (rates["frame"] * (after[0] - before[0]) + rates["launch"] * (after[1] - before[1]))
            for before, after in pairs
        ]


def step_seconds(host: list[float], gpu: list[list[float]]) -> float:
    """Return the time of a step in which the host launches as it stands.

    A stretch begins with an idle GPU, because the host has waited for it. The host launches the stretch's operations at
    even distances; each begins when it is launched and the one before is done.

    Args:
        host: seconds of the host's work in each stretch.
        gpu: seconds of each operation of the same stretches.
    """
    total = 0.0
    for stretch, operations in zip_longest(host, gpu):  # two steps, in which the host should wait as often
        busy, launched, done = stretch or 0.0, operations or [], 0.0
        for number, seconds in enumerate(launched, start=1):
            done = max(done, busy * number / len(launched)) + seconds
        total += max(done, busy)
    return total
