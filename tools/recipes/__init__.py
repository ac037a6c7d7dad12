"""The models of the paper and of the quickstart: their Megatron flags, FLOPs, and how a launch script starts them."""
