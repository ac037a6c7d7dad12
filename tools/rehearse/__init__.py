"""Simulates a training on GPUs that are not there, before a node is paid for."""
