"""Grids of training runs, and their tables."""
