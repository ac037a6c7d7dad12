"""Train three models on real text and compare them."""
