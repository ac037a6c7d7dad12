"""What runs beside a training, each started by `python tools/NAME`."""
