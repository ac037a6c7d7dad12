"""Events, of which a CPU needs none."""


class EventHandle:
    """A point in a stream."""


class EventOverlap:
    """Wait for such a point."""

    def __init__(self, event: EventHandle | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        """Everything is done already."""
