"""GPT-2's vocabulary files, Megatron's data sets on disk, atomic writes, and errors that the user can correct."""
