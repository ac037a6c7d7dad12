"""A ReMoE (arXiv 2412.14711) for transformers: Llama with experts chosen by ReLU, top-k or hash, or without experts."""

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
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeExperts, Qwen3MoeMLP
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .configuration_remoe import RemoeConfig
from .routing_remoe import RemoeRouter, newest_mask, routing_loss, share_of_items
from .training_remoe import SparsityCallback


@dataclass
class RemoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Output of transformers' MoE models. `aux_loss` is the L1 term, or top-k's load balancing loss, over all layers.

    Attributes:
        sparsity: scalar, share of inactive (token, expert) pairs. Like `aux_loss`, None without `output_router_logits`.
    """

    sparsity: torch.Tensor | None = None


class RemoeSparseMoeBlock(nn.Module):
    """Compute the experts of the active (token, expert) pairs, and the experts that all tokens share."""

    def __init__(self, config: RemoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate = RemoeRouter(config, layer_idx)
        self.experts = Qwen3MoeExperts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = Qwen3MoeMLP(config, shared) if shared else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None
        self.config = config

    def forward(self, hidden_states: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return each token's sum over its experts, `[batch, sequence, hidden]`.

        Args:
            hidden_states: `[batch, sequence, hidden]`.
            token_ids: int64 `[batch, sequence]`, for routing by hash.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, gates, experts = self.gate(tokens, token_ids) if self.config.hash_routing else self.gate(tokens)
        all_active = self.config.moe_relu_routing and self.config.max_experts_per_token is None
        output = self._active(tokens, gates) if all_active else self.experts(tokens, experts, gates)
        if self.shared_expert is not None:
            gate = 1.0 if self.shared_expert_gate is None else self.shared_expert_gate(tokens).sigmoid()
            output = output + self.shared_expert(tokens) * gate
        return output.reshape(hidden_states.shape)

    def _active(self, tokens: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        # Each pair becomes a token with one expert, which every experts implementation of transformers supports.
        token, expert = gates.nonzero(as_tuple=True)
        if not len(token):  # add a pair whose gate is 0: ranks wait for each other's gradients of all weights
            token = expert = token.new_zeros(1)
        pairs = self.experts(tokens[token], expert.unsqueeze(-1), gates[token, expert].unsqueeze(-1))
        total = torch.zeros(tokens.shape, dtype=torch.promote_types(tokens.dtype, torch.float32), device=tokens.device)
        return total.index_add(0, token, pairs.to(total.dtype)).to(tokens.dtype)


class RemoeDecoderLayer(GradientCheckpointingLayer):
    """Llama's layer, with experts in place of its MLP where the configuration has them."""

    def __init__(self, config: RemoeConfig, layer_idx: int) -> None:
        super().__init__()
        attention: Any = Qwen3MoeAttention if config.qk_norm else LlamaAttention
        self.self_attn = attention(config, layer_idx)
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
        """Run the layer as Llama's does.

        Args:
            token_mask: bool `[batch, sequence]`, False at padding, where the experts get zeros and so return zeros.
            token_ids: int64 `[batch, sequence]`, for routing by hash.
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if token_mask is not None and isinstance(self.mlp, RemoeSparseMoeBlock):
            normed = normed.masked_fill(~token_mask.unsqueeze(-1), 0.0)  # without bias, no logit is positive
        ids = (token_ids,) if isinstance(self.mlp, RemoeSparseMoeBlock) and token_ids is not None else ()
        return hidden_states + self.mlp(normed, *ids)


class RemoePreTrainedModel(LlamaPreTrainedModel):
    """Settings that transformers reads, for all ReMoE models."""

    config: RemoeConfig
    _no_split_modules = ["RemoeDecoderLayer"]
    _can_compile_fullgraph = False
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(RemoeRouter, index=0),
        "hidden_states": RemoeDecoderLayer,
        "attentions": [LlamaAttention, Qwen3MoeAttention],
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
            if module.gate_scale is not None:
                init.ones_(module.gate_scale)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)


class RemoeModel(RemoePreTrainedModel, LlamaModel):
    """The embedding, the layers and the final norm."""

    _auto_class = "AutoModel"

    def __init__(self, config: RemoeConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(RemoeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()
        if config.num_experts and (config.hidden_size % 8 or config.moe_intermediate_size % 8):
            self.set_experts_implementation("eager")  # grouped_mm needs rows of 16 bytes: 8 elements of bf16

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,  # vLLM looks for this name in the signature
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the model as `LlamaModel` does. Experts get zeros at padding, where a 2D `attention_mask` is 0."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None and (token_mask := newest_mask(attention_mask, given.shape[1])) is not None:
            kwargs["token_mask"] = token_mask
        if self.config.hash_routing:
            kwargs["token_ids"] = input_ids
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class RemoeForCausalLM(RemoePreTrainedModel, LlamaForCausalLM):
    """`RemoeModel` with a language modeling head.

    Attributes:
        routing_counts: int64 `[2]`, active and all (token, expert) pairs of forward passes in training; None unless
            `SparsityCallback` counts them.
    """

    _auto_class = "AutoModelForCausalLM"
    routing_counts: torch.Tensor | None = None

    def __init__(self, config: RemoeConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = RemoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def sparsity_callback(self, multiplier: float = 1.2) -> SparsityCallback:
        """Return a callback for transformers' `Trainer` that holds the sparsity at its target.

        Args:
            multiplier: α, the factor by which λ changes per step; above 1.
        """
        return SparsityCallback(multiplier)

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
        """Run the model as `LlamaForCausalLM` does.

        Args:
            input_ids, attention_mask, labels, logits_to_keep, kwargs: as for Llama.
            output_router_logits: overrides the configuration's value. If True, a loss includes λ times `aux_loss`.

        Raises:
            ValueError: re-entrant checkpointing, or counting without labels, would lose the gradient of `aux_loss`.
        """
        counts = self.routing_counts if self.training else None
        if counts is not None and labels is None:
            raise ValueError("SparsityCallback needs labels. Leave out label_smoothing_factor and compute_loss_func.")
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits or counts is not None
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, output_router_logits=output_router_logits, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = aux_loss = sparsity = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if output_router_logits and outputs.router_logits:
            token_mask = newest_mask(attention_mask, outputs.last_hidden_state.shape[1])
            aux_loss, pairs = routing_loss(self.config, outputs.router_logits, token_mask)
            lost = outputs.last_hidden_state.requires_grad and not aux_loss.requires_grad
            if lost and self.config.router_aux_loss_coef and self.model.gradient_checkpointing:
                raise ValueError(
                    "Gradient checkpointing with use_reentrant=True drops the gradient of aux_loss. Set "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            sparsity = 1.0 - pairs[0] / pairs[1].clamp(min=1)
            if counts is not None:
                counts += pairs.to(counts.device)
            if labels is not None and loss is not None:
                # The loss is a mean over all labels of a step, so weigh the term by this micro-batch's labels.
                share = self.config.router_aux_loss_coef * share_of_items(labels, **kwargs)
                loss = loss + share * aux_loss.to(loss.device)
        # The cache's name has changed between versions of transformers.
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return RemoeCausalLMOutputWithPast(loss=loss, logits=logits, aux_loss=aux_loss, sparsity=sparsity, **others)
