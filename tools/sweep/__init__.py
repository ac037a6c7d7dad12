"""The paper's scaling figures, run by run."""
