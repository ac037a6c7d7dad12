"""The model for transformers."""
