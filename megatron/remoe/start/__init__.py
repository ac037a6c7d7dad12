"""Checks before a training run starts, and error messages for when it cannot start or fails."""
