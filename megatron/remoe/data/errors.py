"""The error that a user can correct."""


class DataError(ValueError):
    """Wrong input or output; the message names the flag or file, the problem and the remedy."""
