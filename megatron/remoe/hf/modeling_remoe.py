"""A ReMoE (arXiv 2412.14711) for transformers: Llama with experts chosen by ReLU routing, or top-k, or none."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeMLP
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .configuration_remoe import RemoeConfig

TINY = 1e-20  # as Megatron adds to sums of sigmoids, which may all be 0


@dataclass
class RemoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """As transformers' own; with `output_router_logits` also `aux_loss`, the L1 term summed over the layers, and:

    Attributes:
        sparsity: scalar, share of (token, expert) pairs that are inactive.
    """

    sparsity: torch.Tensor | None = None


class RemoeRouter(nn.Module):
    """Which experts a token goes to, and with which gates."""

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, config: RemoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.dtype = getattr(torch, config.router_dtype) if config.router_dtype else None
        if not config.hash_routing:
            self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        # In float32, whatever the model is in.
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.router_expert_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, tokens: torch.Tensor, token_ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            tokens: `[tokens, hidden]`.
            token_ids: int64, of these tokens in any shape, for routing by hash (arXiv 2106.04426).

        Returns:
            logits, gates: `[tokens, num_experts]` in the router's dtype; gates of inactive experts are 0. Routing by
            hash has no logits: they are the gates.

        Raises:
            ValueError: there are no ids, and routing is by hash.
        """
        dtype, k = self.dtype or tokens.dtype, self.config.num_experts_per_tok
        if self.config.hash_routing:
            gates = _largest(self._hashed(token_ids), k).to(dtype)
            return gates, gates
        logits = nn.functional.linear(tokens.to(dtype), self.weight.to(dtype))
        if self.config.moe_relu_routing:
            return logits, torch.relu(logits)
        scores = scores_of(self.config, logits)
        biased = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        experts = biased.topk(k).indices
        top = scores.gather(-1, experts)
        if self.config.norm_topk_prob:
            top = top / (top.sum(dim=-1, keepdim=True) + TINY)
        top = top * self.config.routed_scaling_factor
        return logits, torch.zeros_like(logits).scatter(-1, experts, top.to(dtype))

    def _hashed(self, token_ids: torch.Tensor | None) -> torch.Tensor:
        """Numbers `[tokens, num_experts]`, the same for the same id, of which the largest are taken."""
        if token_ids is None:
            raise ValueError("With hash_routing experts follow from input_ids; inputs_embeds alone will not do.")
        experts = torch.arange(self.config.num_experts, device=token_ids.device)
        layer = self.config.num_experts * (self.layer_idx + 1)
        return _mixed(_mixed(token_ids.reshape(-1, 1)) + _mixed(experts + layer))


class RemoeSparseMoeBlock(nn.Module):
    """Experts, computed for the pairs of token and expert that are active, and experts that all tokens share."""

    def __init__(self, config: RemoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate = RemoeRouter(config, layer_idx)
        self.experts = Qwen3MoeExperts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = Qwen3MoeMLP(config, shared) if shared else None
        self.width = config.max_experts_per_token if config.moe_relu_routing else config.num_experts_per_tok

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `[batch, sequence, hidden]`.
            token_mask: bool `[batch, sequence]`, False at padding, which goes to no routed expert.
            token_ids: int64 `[batch, sequence]`, for routing by hash.

        Returns:
            `[batch, sequence, hidden]`.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, gates = self.gate(tokens, token_ids)
        if token_mask is not None:
            gates = gates.masked_fill(~token_mask.reshape(-1, 1), 0.0)
        if self.width is None:
            output = self._varying(tokens, gates)
        else:
            top, experts = gates.topk(self.width)
            output = self.experts(tokens, experts, top)
        if self.shared_expert is not None:
            output = output + self.shared_expert(tokens)
        return output.view_as(hidden_states)

    def _varying(self, tokens: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        # Each pair is a token of its own with one expert: what any implementation of experts in transformers takes.
        token, expert = gates.nonzero(as_tuple=True)
        if not len(token):
            return torch.zeros_like(tokens)
        pairs = self.experts(tokens[token], expert.unsqueeze(-1), gates[token, expert].unsqueeze(-1))
        total = torch.zeros(tokens.shape, dtype=torch.promote_types(tokens.dtype, torch.float32), device=tokens.device)
        return total.index_add(0, token, pairs.to(total.dtype)).to(tokens.dtype)


class RemoeDecoderLayer(GradientCheckpointingLayer):
    """Llama's layer, with experts in place of its MLP where the configuration has them."""

    def __init__(self, config: RemoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        is_sparse = bool(config.num_experts) and layer_idx not in config.mlp_only_layers
        self.mlp = RemoeSparseMoeBlock(config, layer_idx) if is_sparse else Qwen3MoeMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As Llama's; `token_mask`, `token_ids`: see `RemoeSparseMoeBlock`."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        sparse = isinstance(self.mlp, RemoeSparseMoeBlock)
        return hidden_states + (self.mlp(normed, token_mask, token_ids) if sparse else self.mlp(normed))


class RemoePreTrainedModel(LlamaPreTrainedModel):
    """What transformers asks of all models of a kind."""

    config: RemoeConfig
    config_class = RemoeConfig
    _no_split_modules = ["RemoeDecoderLayer"]
    _can_compile_fullgraph = False
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(RemoeRouter, index=0),
        "hidden_states": RemoeDecoderLayer,
        "attentions": LlamaAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would look for Qwen3MoeExperts' decorator in this file

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Qwen3MoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, RemoeRouter):
            if not self.config.hash_routing:
                init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)


class RemoeModel(RemoePreTrainedModel, LlamaModel):
    """Embedding, layers and the last norm."""

    _auto_class = "AutoModel"

    def __init__(self, config: RemoeConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(RemoeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As Llama's; padding (0 in a two-dimensional `attention_mask`) is not routed."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None and (token_mask := newest_tokens(attention_mask, given.shape[1])) is not None:
            kwargs["token_mask"] = token_mask
        if self.config.hash_routing:
            kwargs["token_ids"] = input_ids
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )


class RemoeForCausalLM(RemoePreTrainedModel, LlamaForCausalLM):
    """The language model."""

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: RemoeConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = RemoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> RemoeCausalLMOutputWithPast:
        """As Llama's.

        Args:
            output_router_logits: in place of the configuration's.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, output_router_logits=output_router_logits, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = aux_loss = sparsity = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if output_router_logits and outputs.router_logits:
            aux_loss, sparsity = routing_loss(
                self.config,
                outputs.router_logits,
                newest_tokens(attention_mask, outputs.last_hidden_state.shape[1]),
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        # The cache's name has changed between versions of transformers.
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return RemoeCausalLMOutputWithPast(loss=loss, logits=logits, aux_loss=aux_loss, sparsity=sparsity, **others)


def scores_of(config: RemoeConfig, logits: torch.Tensor) -> torch.Tensor:
    """Of top-k routing, of the shape of the logits, at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(dim=-1)


def newest_tokens(attention_mask: Any, length: int) -> torch.Tensor | None:
    """bool `[batch, length]`, False at padding; None where no two-dimensional mask, of cached tokens too, tells it."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -length:].bool()


def routing_loss(
    config: RemoeConfig, router_logits: tuple[torch.Tensor, ...], token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The load-balanced L1 term (section 3.4) summed over the layers, or with top-k the load balancing loss; sparsity.

    Args:
        router_logits: of each layer with experts, `[batch * sequence, num_experts]`.
        token_mask: bool `[batch, sequence]`, False at padding, which does not count.

    Returns:
        The term, which has a gradient, and S, the share of inactive pairs: scalars.
    """
    experts, k = config.num_experts, config.num_experts_per_tok
    losses, sparsities = [], []
    for logits in router_logits:
        if token_mask is not None:
            logits = logits[token_mask.reshape(-1).to(logits.device)]
        scores = torch.relu(logits).float() if config.moe_relu_routing else scores_of(config, logits)
        active = scores > 0 if config.moe_relu_routing else _largest(scores, k)
        if not config.moe_relu_routing and config.scoring_func == "sigmoid":
            scores = scores / (scores.sum(dim=-1, keepdim=True) + TINY)
        tokens = max(len(scores), 1)
        load = active.sum(dim=0) * (experts / (k * tokens))
        losses.append((load * scores).sum() / tokens)
        sparsities.append(1.0 - active.float().sum() / (tokens * experts))
    device = losses[0].device
    mean_sparsity = torch.stack([sparsity.to(device) for sparsity in sparsities]).mean()
    return torch.stack([loss.to(device) for loss in losses]).sum(), mean_sparsity


def _largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k).indices, True)


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """int64 → 32 bits that depend on all of the number's lower 32, in int64; as in training."""
    for _ in range(2):
        numbers = ((numbers >> 16) ^ numbers) * 0x45D9F3B & 0xFFFFFFFF
    return (numbers >> 16) ^ numbers
