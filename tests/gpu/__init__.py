"""Tests that need a GPU, in the order of what they are worth; `pytest -m gpu tests/gpu --gpu-report FOLDER`."""
