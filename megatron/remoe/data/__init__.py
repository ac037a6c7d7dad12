"""GPT-2's vocabularies without network, and Megatron's data sets on disk, .bin and .idx."""
