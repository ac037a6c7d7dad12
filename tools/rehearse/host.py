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


def step_seconds(host: list[float], gpu: list[list[float]], left: list[int] | None = None) -> float:
    """Return the time of a step in which the host launches as it stands.

    The host launches each stretch's operations at even distances; each begins when it is launched and the one before is
    done. At the end of a stretch the host waits for the GPU, except for some operations that may still run.

    Args:
        host: seconds of the host's work in each stretch.
        gpu: seconds of each operation of the same stretches.
        left: operations that each wait leaves running (default: none).
    """
    clock, ends = 0.0, [0.0]
    for stretch, operations, running in zip_longest(host, gpu, left or []):  # host and GPU may differ by a stretch
        busy, launched = stretch or 0.0, operations or []
        for number, seconds in enumerate(launched, start=1):
            ends.append(max(ends[-1], clock + busy * number / len(launched)) + seconds)
        clock = max(clock + busy, ends[max(0, len(ends) - 1 - (running or 0))])
    return max(clock, ends[-1])
