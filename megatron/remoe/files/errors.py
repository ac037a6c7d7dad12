"""Errors that the user can correct."""


class UsageError(ValueError):
    """Wrong settings, input or output; the message names the flag or file, what is wrong, and the remedy.

    Attributes:
        code: a stable identifier, printed after the message; docs/errors.md lists all codes.
    """

    code = ""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = self.code if code is None else code


class DataError(UsageError):
    """Wrong input or output."""

    code = "REMOE-E300"


def with_code(error: BaseException) -> str:
    """Return an error's message, followed by its code if it is a `UsageError` that has one."""
    code = error.code if isinstance(error, UsageError) else ""
    return str(error).strip() + (f" [{code}]" if code else "")
