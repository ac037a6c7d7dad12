"""A run's folder: start and watch a training run, and read its figures."""
