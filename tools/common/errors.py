"""Errors that a user can fix."""


class ToolError(Exception):
    """A tool cannot go on; the message says what happened and what to do."""

    exit_code = 1


class ConversionError(ToolError):
    """A model cannot be read or written; the message names the flag or file, what is wrong, and the remedy."""
