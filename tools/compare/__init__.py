"""Compare routings over corpora and seeds."""
