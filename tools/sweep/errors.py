"""What a user can act on."""

from ..common.errors import ToolError


class SettingsError(ToolError):
    """The command line does not fit the scripts, or what is in the output folder."""

    exit_code = 2
