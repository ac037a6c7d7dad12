"""Tests, in a folder for each room of the code."""
