"""Compute cross entropy with flash-linear-attention's kernels; tensor parallel ranks can share the vocabulary."""

import torch


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: torch.Tensor, target: torch.Tensor, tp_group: torch.distributed.ProcessGroup | None
) -> torch.Tensor:
    """Return each token's loss. Each pass reads the logits once; the backward pass overwrites them with their gradient.

    Args:
        vocab_parallel_logits: `[sequence, batch, vocabulary / ranks]`, of any floating-point type; computed in fp32.
        target: int64 `[sequence, batch]`, ids in the whole vocabulary.
        tp_group: the ranks that share the vocabulary; None if it is whole.

    Returns:
        fp32 `[sequence, batch]`, in nats.
    """
    from fla.modules.fused_cross_entropy import cross_entropy_loss  # takes seconds to import, and only GPUs use it

    loss, _ = cross_entropy_loss(
        vocab_parallel_logits.flatten(0, 1), target.flatten(), inplace_backward=True, process_group=tp_group
    )
    return loss.view_as(target)
