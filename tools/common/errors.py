"""What a user can act on."""


class ToolError(Exception):
    """A tool cannot go on; the message says what happened and what to do."""

    exit_code = 1
