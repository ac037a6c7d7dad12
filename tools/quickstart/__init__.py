"""The quickstart: three models on real text, compared."""
