"""Memory, FLOPs and hours of a training run, without and with a rehearsal."""
