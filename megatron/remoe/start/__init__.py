"""Checks before a training starts, and error messages for when it cannot start or fails."""
