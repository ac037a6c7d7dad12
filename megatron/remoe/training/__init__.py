"""Flags, and hooks into Megatron's own training loop; see examples/own_training_script.py."""
