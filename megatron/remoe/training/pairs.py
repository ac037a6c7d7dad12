"""Count the pairs of a token and an expert that top-k and baseline routers compute in training."""

from functools import partial
from typing import Any

import torch

from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_model_config
from megatron.remoe.routing.counts import count_layers, layer_numbers


class PairCounter:
    """Sum the pairs of all ranks' routers once per step, for the exact FLOPs where experts per token vary."""

    def __init__(self, model_chunks: list[torch.nn.Module]) -> None:
        """
        Args:
            model_chunks: the model on this rank, all its virtual pipeline stages; may hold no router.
        """
        config = get_model_config(model_chunks[0])
        modules = [module for chunk in model_chunks for module in chunk.modules()]
        self.routers = [module for module in modules if isinstance(module, TopKRouter)]
        # Each table has a row per layer: the tokens of each expert, then all tokens. `_step` counts this rank's current
        # step, `_last` the last step of all ranks, and `running_sums` all steps.
        shape = count_layers(modules, config), (config.num_moe_experts or 0) + 1
        make = partial(torch.zeros, shape, dtype=torch.float64, device=torch.cuda.current_device())
        self._step, self._last, self.running_sums = make(), make(), make()
        for router, number in zip(self.routers, layer_numbers(self.routers, modules, config.num_layers), strict=True):
            router.register_forward_hook(partial(self._count, number - 1), with_kwargs=True)

    def _count(self, row: int, router: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Add a micro-batch to a row of `_step`, in a hook after the router's forward pass."""
        # Recomputation runs the forward pass twice, the first time without gradients.
        if router.training and torch.is_grad_enabled():
            _, map_TE = output
            padding_mask = kwargs.get("padding_mask", args[1] if len(args) > 1 else None)
            if padding_mask is not None:  # hash layers route padding, too
                map_TE = map_TE & ~padding_mask.reshape(-1, 1)
            self._step[row, :-1] += map_TE.sum(dim=0)
            self._step[row, -1] += len(map_TE) if padding_mask is None else (~padding_mask).sum()

    @torch.no_grad()
    def update(self) -> None:
        """Sum the pairs over all ranks and end the routers' step. Call it on all ranks after all backward passes."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(self._step)
        self.running_sums += self._step
        for router in self.routers:
            if hasattr(router, "end_step"):
                router.end_step()
        self._last.copy_(self._step)
        self._step.zero_()

    def totals(self) -> dict[str, int]:
        """Return the computed pairs, and tokens times MoE layers, of all steps and ranks. Waits for the device."""
        sums = self.running_sums.sum(dim=0)
        return {"total_active_pairs": int(sums[:-1].sum()), "total_layer_tokens": int(sums[-1])}

    def tokens_per_expert(self) -> dict[int, list[float]]:
        """Return layer (from 1) → share of its tokens that each expert got in the last step; waits for the device."""
        table = self._last.cpu()
        return {
            number: [round(share, 5) for share in (row[:-1] / row[-1]).tolist()]
            for number, row in enumerate(table, start=1)
            if row[-1] > 0
        }
