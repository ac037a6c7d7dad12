"""Analyses of a trained router."""
