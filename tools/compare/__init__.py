"""Routings beside each other, over corpora and seeds."""
