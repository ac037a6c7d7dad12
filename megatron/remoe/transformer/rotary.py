"""Rotary position embedding by a Triton kernel."""

from functools import lru_cache

import torch


def fused_rotary_embedding(t: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotate queries or keys, as Megatron's `fused_apply_rotary_pos_emb` does.

    Args:
        t: `[sequence, batch, heads, size]`.
        freqs: fp32 `[sequence, 1, 1, rotated size]`, angles in radians.
        interleaved: rotate neighbours into each other, instead of a head's first half into its second.

    Returns:
        The rotated tensor, of the shape and type of `t`.
    """
    from megatron.remoe.kernels.rotary import rotate  # imports Triton, which only GPUs have

    return rotate(t, *cosine_and_sine(freqs, interleaved, t.dtype), interleaved)


@lru_cache(maxsize=4)  # Megatron passes the same tensor in all layers and steps
def cosine_and_sine(freqs: torch.Tensor, interleaved: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of each angle, both `[sequence, rotated size / 2]`."""
    angles = freqs[:, 0, 0, ::2] if interleaved else freqs[:, 0, 0].chunk(2, dim=-1)[0]
    return angles.cos().to(dtype).contiguous(), angles.sin().to(dtype).contiguous()
