"""Define errors that the user can fix."""


class ToolError(Exception):
    """The tool cannot continue; the message names the problem and the remedy."""

    exit_code = 1


class ConversionError(ToolError):
    """A model cannot be read or written; the message names the flag or file, what is wrong, and the remedy."""
