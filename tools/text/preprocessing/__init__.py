"""Turn text into Megatron data sets: read .jsonl, tokenize it at tens of MB/s, write .bin and .idx."""
