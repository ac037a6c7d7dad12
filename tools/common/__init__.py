"""Shared helpers of the tools."""
