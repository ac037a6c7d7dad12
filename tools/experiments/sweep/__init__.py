"""Train the runs of the paper's scaling figures."""
