"""Count the pairs of a token and an expert that baseline routers compute in training."""

from collections.abc import Iterable
from typing import Any

import torch

from megatron.core.transformer.moe.router import TopKRouter


class PairCounter:
    """Sum the pairs of all ranks' routers once per optimizer step.

    The sums give the exact FLOPs of routers whose number of experts per token varies.
    """

    def __init__(self, model_chunks: Iterable[torch.nn.Module]) -> None:
        """
        Args:
            model_chunks: the model on this rank, all its virtual pipeline stages; may hold no router.
        """
        modules = [module for chunk in model_chunks for module in chunk.modules()]
        self.routers = [module for module in modules if isinstance(module, TopKRouter)]
        device = torch.device(torch.cuda.current_device())
        # Pairs, and tokens times layers: this rank's in the current step, and the sums over ranks and steps.
        self._step, self.running_sums = (torch.zeros(2, dtype=torch.float64, device=device) for _ in range(2))
        for router in self.routers:
            router.register_forward_hook(self._count, with_kwargs=True)

    def _count(
        self, router: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any], routed: tuple[torch.Tensor, ...]
    ) -> None:
        # Recomputation runs the forward pass twice, the first time without gradients.
        if router.training and torch.is_grad_enabled():
            padding = named.get("padding_mask", given[1] if len(given) > 1 else None)
            tokens = len(routed[1]) - (0 if padding is None else padding.sum())
            self._step[0] += routed[1].sum()
            self._step[1] += tokens

    @torch.no_grad()
    def update(self) -> None:
        """Add the step's pairs of all ranks to the sums. Call it on every rank, after the backward passes."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(self._step)
        self.running_sums += self._step
        for router in self.routers:
            if hasattr(router, "end_step"):
                router.end_step()
        self._step.zero_()

    def totals(self) -> dict[str, int]:
        """Return the two running sums, under their names in the run's log; waits for the device."""
        pairs, tokens = map(int, self.running_sums.tolist())
        return {"total_active_pairs": pairs, "total_layer_tokens": tokens}
