"""Estimate the cost of a training before it starts."""
