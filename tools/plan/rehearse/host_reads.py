"""Replace the values that the host reads from the device, after the real launches and waits."""

import random
from collections.abc import Callable
from typing import Any

import torch

SPREAD = 0.1  # largest relative deviation of an expert's share from the mean


class Pairs:
    """Replaces the counts that the host reads from routing maps.

    Attributes:
        share: active share of (token, expert) pairs, 0 to 1.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._random = random.Random(1234)

    def put_in(self) -> None:
        """Patch the readers; call this when Megatron is imported."""
        from megatron.core.transformer.moe import token_dispatcher
        from megatron.remoe.layer import counting

        counting.read_pairs = self.counted(counting.read_pairs)
        token_dispatcher.maybe_move_tensor_to_cpu = self._moved(token_dispatcher.maybe_move_tensor_to_cpu)
        item, truth = torch.Tensor.item, torch.Tensor.__bool__

        def read(tensor: torch.Tensor) -> Any:
            """Read losses and norms as 1: their memory is uninitialized."""
            value = item(tensor)
            return 1.0 if tensor.is_cuda and tensor.is_floating_point() else value

        def read_truth(tensor: torch.Tensor) -> bool:
            """Read every truth value on the device as false: its memory may hold bytes of an earlier copy."""
            return truth(tensor) and not tensor.is_cuda

        for name, function in {"item": read, "__bool__": read_truth}.items():
            setattr(torch.Tensor, name, function)

    def counted(self, real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Return `read_pairs` with the numbers of this share, about evenly over the experts."""

        def read_pairs(routing_map: torch.Tensor, chunks: int, *how: Any) -> torch.Tensor:
            pairs = real(routing_map, chunks, *how)
            for chunk, tokens in enumerate(len(part) for part in routing_map.tensor_split(chunks)):
                for number in pairs[chunk]:
                    number.copy_(torch.tensor([self._some_of(tokens) for _ in number]))
            return pairs

        return read_pairs

    def _some_of(self, tokens: int) -> int:
        off = self._random.uniform(-SPREAD, SPREAD)
        return min(tokens, max(0, round(tokens * self.share * (1 + off))))

    def _moved(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the function through which Megatron's own dispatchers read: they get the numbers of an even load."""
        from megatron.training import get_args

        def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
            found = real(tensor, as_numpy, record_stream)
            if not torch.is_tensor(tensor) or not tensor.is_cuda:
                return found
            args = get_args()
            tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
            tokens //= args.tensor_model_parallel_size if args.sequence_parallel else 1
            pairs = int(tokens * args.num_experts * self.share)
            # Scalar: all pairs. Row: its share for each entry. Table: pairs of each rank for each expert.
            found[...] = pairs // (1, max(1, len(tensor.shape) and tensor.shape[0]), args.num_experts)[tensor.dim()]
            return found

        return move
