"""A Megatron checkpoint becomes a folder for Hugging Face transformers, and such a folder a checkpoint."""
