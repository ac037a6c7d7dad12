"""Hash layers (Roller et al., arXiv 2106.04426): a token's id decides its experts."""

from typing import Any

import torch

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.moe.router import TopKRouter

BITS = 0xFFFFFFFF


class HashRouter(TopKRouter):
    """Give each token id `moe_router_topk` fixed experts with gates of 1. Each layer has a different assignment.

    Nothing is learned, and the load is not balanced: experts of frequent ids get more tokens.

    Attributes:
        token_ids: `[batch, sequence]`, the ids of the next tokens of the whole tensor parallel group. The hook of
            `pass_token_ids` sets them.
    """

    token_ids: torch.Tensor | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.weight = self.bias = None  # Megatron waits for the gradient of every parameter

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route tokens `[sequence, batch, hidden]`, padding included; return gates and map as Megatron's router does.

        Raises:
            RuntimeError: `token_ids` is None.
        """
        if self.token_ids is None:
            raise RuntimeError("HashRouter has no token ids: call pass_token_ids with the model once it is built.")
        ids = self.token_ids.transpose(0, 1)
        if self.config.sequence_parallel:
            ids = scatter_to_sequence_parallel_region(ids.contiguous(), group=self.tp_group)
        experts = torch.arange(self.num_experts, device=ids.device)
        drawn = _hash32(_hash32(ids.reshape(-1, 1)) + _hash32(experts + self.num_experts * self.layer_number))
        chosen = drawn.topk(self.topk, dim=1).indices
        routing_map = torch.zeros_like(drawn, dtype=torch.bool).scatter_(1, chosen, True)
        return routing_map.to(input.dtype), routing_map


def pass_token_ids(model_chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Make the embedding pass its token ids to the model's hash routers, and return `model_chunks`.

    A router gets only hidden states, and no public hook passes ids through the layers. All layers must be in this
    process. They must read the ids of a micro-batch before the embedding gets the next one.
    """
    modules = [module for chunk in model_chunks for module in chunk.modules()]
    routers = [module for module in modules if isinstance(module, HashRouter)]

    def pass_ids(_embedding: torch.nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        for router in routers:
            router.token_ids = named["input_ids"] if "input_ids" in named else inputs[0]

    for module in modules:
        if isinstance(module, LanguageModelEmbedding):
            module.register_forward_pre_hook(pass_ids, with_kwargs=True)
    return model_chunks


def _hash32(numbers: torch.Tensor) -> torch.Tensor:
    """Hash the lower 32 bits of int64 numbers, as hf/routing_remoe.py does in exported models, which need the same."""
    for _ in range(2):
        numbers = ((numbers >> 16) ^ numbers) * 0x45D9F3B & BITS
    return (numbers >> 16) ^ numbers
