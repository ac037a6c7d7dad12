"""From text to data sets: reads .jsonl, tokenizes at tens of MB/s, writes .bin and .idx."""
