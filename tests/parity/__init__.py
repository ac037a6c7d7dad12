"""Tests that every layout trains like one process."""
