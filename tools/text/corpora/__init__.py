"""Build the three corpora of real text on which tiny models are trained and compared."""
