"""What a user can act on."""

from ..common.errors import ToolError


class SweepError(ToolError):
    """The sweep cannot go on; the message says what happened and what to do."""


class SettingsError(SweepError):
    """The command line does not fit the scripts, or what is in the output folder."""

    exit_code = 2
