"""Observe the routing of a model for transformers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron.remoe.hf import RemoeForCausalLM
from megatron.remoe.hf.modeling_remoe import RemoeSparseMoeBlock

from ..common.expert_counts import expert_blocks

See = Callable[[int, torch.Tensor, torch.Tensor], None]


@contextmanager
def observe_routing(model: RemoeForCausalLM, see: See) -> Iterator[None]:
    """Call `see` for each layer in each forward pass, inside the block.

    Its arguments, tensors on the CPU:
        the layer's index among those with experts, from 0.
        gates `[batch, length, experts]` in the router's dtype, 0 for inactive experts.
        the largest gate's share of the output, float32 `[batch, length]`: |a| / (|a| + |b|), where a is the output of
            that expert and b the sum of the others, without shared experts; NaN if both are 0.
    """
    handles = []
    for place, block in enumerate(expert_blocks(model).values()):

        def look(block: RemoeSparseMoeBlock, given: tuple, output: torch.Tensor, place: int = place) -> None:
            hidden_states, *token_ids = given
            tokens = hidden_states.flatten(0, 1)
            logits, top, experts = block.gate(tokens, *token_ids)
            gates = torch.zeros_like(logits).scatter(-1, experts, top)
            routed = output.flatten(0, 1)
            if block.shared_expert is not None:
                routed = routed - block.shared_expert(tokens)
            gate, expert = gates.max(dim=-1, keepdim=True)
            largest = block.experts(tokens, expert, gate)
            size, rest = largest.float().norm(dim=-1), (routed - largest).float().norm(dim=-1)
            shape = hidden_states.shape[:2]
            see(place, gates.unflatten(0, shape).cpu(), (size / (size + rest)).unflatten(0, shape).cpu())

        handles.append(block.register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
