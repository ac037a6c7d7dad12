"""Measure ReMoE's lead over training length, at equal steps and equal FLOPs."""
