"""Recipes of the paper's models and of the tiny ones: Megatron flags, FLOPs, and the command of a launch script."""
