"""Compare ways of training by length, at equal steps and at equal FLOPs."""
