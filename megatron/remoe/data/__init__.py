"""GPT-2 vocabulary files, and Megatron's data sets on disk (.bin and .idx)."""
