"""A dense or top-k checkpoint starts a ReMoE."""
