"""Gather and reduce-scatter unequal parts, which gloo cannot: pad to the longest part, then cut."""

from collections.abc import Callable
from typing import Any

import torch

Collective = Callable[..., torch.Tensor]


def with_padding(gather: Collective, reduce_scatter: Collective) -> tuple[Collective, Collective]:
    """Return Megatron's two collectives along the first dimension, extended to unequal parts.

    Args:
        gather: `(input, group, output_split_sizes, use_global_buffer)`, correct for equal parts.
        reduce_scatter: `(input, group, input_split_sizes, use_global_buffer)`, correct for equal parts.

    Returns:
        Replacements with the same parameters. A split size is the number of rows in a rank's part.
    """

    def padded_gather(
        tensor: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(tensor, group, None, use_global_buffer)
        longest = max(1, *output_split_sizes)  # all parts are empty if a layer routes nothing
        parts = gather(_padded(tensor, longest), group).split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def padded_reduce_scatter(
        tensor: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(tensor, group, None, use_global_buffer)
        longest = max(1, *input_split_sizes)
        parts = [_padded(part, longest) for part in tensor.split(input_split_sizes)]
        return reduce_scatter(torch.cat(parts), group)[: input_split_sizes[group.rank()]]

    return padded_gather, padded_reduce_scatter


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])
