"""Convert checkpoints."""
