"""Flags, and hooks into Megatron's own training loop; docs/design.md shows how a script of one's own uses them."""
