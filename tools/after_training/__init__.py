"""A quickstart's three models through all that follows a training, each step held against the training itself."""
