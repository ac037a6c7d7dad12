"""Tests that need a GPU, the most valuable first; run `pytest -m gpu tests/gpu --gpu-report FOLDER`."""
