"""Tests; most folders are named after the part of the code that they test."""
