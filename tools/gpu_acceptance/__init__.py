"""What a real GPU has to show, in one command of at most a quarter of an hour."""
