"""Define errors that the user can fix; docs/errors.md lists their codes."""

from megatron.remoe.files.errors import UsageError


class ToolError(UsageError):
    """The tool cannot continue; the message names the flag or file, what is wrong, and the remedy."""

    code = "REMOE-E500"
    exit_code = 1


class ConversionError(ToolError):
    """A model cannot be read or written."""

    code = "REMOE-E511"
