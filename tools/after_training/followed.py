"""One model after its training, and what must be true of it."""

from dataclasses import dataclass

import numpy

PROMPT = "My lord, "


@dataclass(frozen=True)
class Followed:
    """What became of one model.

    Attributes:
        logits: largest difference at the export, as a share of the largest logit.
        printed, alone: held-out text → Megatron's validation loss, and that of the folder alone, in nats per token.
        text: that the folder alone made of `PROMPT`.
        before, after: losses of the next steps, of the training's checkpoint and of what came back from the folder.
    """

    logits: float
    printed: dict[str, float]
    alone: dict[str, float]
    text: str
    before: list[float]
    after: list[float]

    def next_difference(self) -> float:
        """Largest relative difference between the next losses."""
        apart = [abs(after - before) / before for before, after in zip(self.before, self.after, strict=True)]
        return float(numpy.max(apart))  # not a number wherever one is, unlike Python's

    def wrong(self) -> list[str]:
        """What is not as it must be."""
        found = [
            f"the loss on {name} is {self.alone[name]}, and Megatron printed {loss}"
            for name, loss in self.printed.items()
            if not abs(self.alone[name] - loss) <= 1e-4
        ]
        if not self.logits <= 1e-4:
            found.append(f"logits differ by {self.logits} of the largest")
        if len(self.text) <= len(PROMPT) or not self.text.startswith(PROMPT):
            found.append(f"{PROMPT!r} was continued as {self.text!r}")
        if not self.next_difference() <= 1e-5:
            found.append(f"the next losses are {self.after}, and the training's own {self.before}")
        return found
