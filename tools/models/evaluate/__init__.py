"""Measure loss, tasks and speed of trained models."""
