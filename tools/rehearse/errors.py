"""What a user can act on."""

from ..common.errors import ToolError


class RehearsalError(ToolError):
    """There can be no rehearsal here; the message says why and what to do."""
