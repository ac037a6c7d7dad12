"""What another version of Megatron would break."""
