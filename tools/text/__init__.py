"""Text and data sets: preprocessing, corpora, inspection."""
