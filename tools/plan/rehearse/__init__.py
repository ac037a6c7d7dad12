"""Simulate a training on GPUs before a node is paid for."""
