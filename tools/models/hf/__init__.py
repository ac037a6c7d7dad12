"""Load a run's checkpoint or an exported folder as a model for transformers."""
