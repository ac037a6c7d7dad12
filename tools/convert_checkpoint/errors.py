"""The mistake that a user can put right."""


class ConversionError(Exception):
    """Wrong input or output; the message names the flag or file, what is wrong, and the remedy."""
