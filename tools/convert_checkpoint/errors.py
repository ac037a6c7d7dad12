"""The mistake that a user can put right."""

from ..common.errors import ToolError


class ConversionError(ToolError):
    """Wrong input or output; the message names the flag or file, what is wrong, and the remedy."""
