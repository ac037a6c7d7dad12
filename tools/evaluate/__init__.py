"""Loss, tasks and speed of trained models."""
