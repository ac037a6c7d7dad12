"""Load a training's checkpoint or an exported folder as a model for transformers."""
