"""Programs around a training. Start one with `python tools/NAME`."""
