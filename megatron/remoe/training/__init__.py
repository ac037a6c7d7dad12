"""Flags, and hooks into Megatron's own training loop; see docs/own_training_script.py."""
