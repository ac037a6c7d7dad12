"""The commands of `remoe`: everything around a training run."""
