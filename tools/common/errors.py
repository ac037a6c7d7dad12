"""Define errors that the user can fix; docs/errors.md lists their codes."""

from megatron.remoe.data.errors import UsageError


class ToolError(UsageError):
    """The tool cannot continue; the message names the flag or file, what is wrong, and the remedy."""

    code = "REMOE-E500"
    exit_code = 1


class ConversionError(ToolError):
    """A model cannot be read or written."""

    code = "REMOE-E511"


def with_code(error: Exception) -> str:
    """Return an error's message, followed by its code if it has one."""
    code = getattr(error, "code", "")
    return f"{error} [{code}]" if code else str(error)
