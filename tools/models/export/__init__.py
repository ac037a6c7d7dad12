"""Convert a Megatron checkpoint to a folder for Hugging Face transformers, and back."""
