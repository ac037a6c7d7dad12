"""Analyze the routing of a trained model."""
