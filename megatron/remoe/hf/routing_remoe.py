"""Route by ReLU, top-k or hash, and compute the loss term of the routing."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .configuration_remoe import RemoeConfig

TINY = 1e-20  # Megatron adds it to a sum of sigmoids, which could be 0


class RemoeRouter(nn.Module):
    """Choose each token's experts and their gates."""

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, config: RemoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.dtype = getattr(torch, config.router_dtype) if config.router_dtype else None
        if not config.hash_routing:
            self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.gate_scale = nn.Parameter(torch.ones(1)) if config.moe_relu_normalize else None
        # float32 even in a half-precision model.
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.router_expert_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(
        self, hidden_states: torch.Tensor, token_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits, gates and experts, as the routers of transformers' MoE models do.

        ReLU routing returns the K = `max_experts_per_token` largest gates, which can be 0, or all (K = E) if that is
        None. Its logits are normalized with `moe_relu_normalize`. Other routing has K = k. Servers depend on the order
        of results and operations (docs/huggingface.md).

        Args:
            hidden_states: `[tokens, hidden]`.
            token_ids: int64, the ids of these tokens in any shape. Routing by hash (arXiv 2106.04426) needs them. Its
                logits are 1 for the chosen experts and 0 for the others.

        Returns:
            Logits `[tokens, num_experts]` and gates `[tokens, K]` in the router's dtype, experts int64 `[tokens, K]`.

        Raises:
            ValueError: routing is by hash and `token_ids` is None.
        """
        dtype, k = self.dtype or hidden_states.dtype, self.config.num_experts_per_tok
        if self.config.hash_routing:
            experts = self._hashed(token_ids).topk(k).indices
            gates = torch.ones(experts.shape, dtype=dtype, device=experts.device)
            logits = gates.new_zeros(len(experts), self.config.num_experts).scatter(-1, experts, gates)
            return logits, gates, experts
        is_cast = self.dtype is not None and torch._C._is_any_autocast_enabled()  # autocast would override it
        with torch.autocast(hidden_states.device.type, enabled=False) if is_cast else nullcontext():
            logits = nn.functional.linear(hidden_states.to(dtype), self.weight.to(dtype))
        if self.config.moe_relu_routing:
            if self.gate_scale is not None:
                logits = nn.functional.normalize(logits, dim=-1)
            gates = torch.relu(logits)
            if self.gate_scale is not None:
                gates = gates * self.gate_scale.to(gates.dtype)
            if self.config.max_experts_per_token is not None:
                return logits, *gates.topk(self.config.max_experts_per_token)
            return logits, gates, torch.arange(self.config.num_experts, device=gates.device).expand_as(gates)
        scores = score_experts(self.config, logits)
        biased = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        experts = biased.topk(k).indices
        top = scores.gather(-1, experts)
        if self.config.norm_topk_prob:
            top = top / (top.sum(dim=-1, keepdim=True) + TINY)
        return logits, (top * self.config.routed_scaling_factor).to(dtype), experts

    def _hashed(self, token_ids: torch.Tensor | None) -> torch.Tensor:
        """Return int64 hashes `[tokens, num_experts]` of ids and experts; a token's k largest are its experts."""
        if token_ids is None:
            raise ValueError("hash_routing chooses experts by input_ids. Give input_ids, not only inputs_embeds.")
        experts = torch.arange(self.config.num_experts, device=token_ids.device)
        layer = self.config.num_experts * (self.layer_idx + 1)
        return _hash32(_hash32(token_ids.reshape(-1, 1)) + _hash32(experts + layer))


def score_experts(config: RemoeConfig, logits: torch.Tensor) -> torch.Tensor:
    """Return the scores of top-k routing, in the shape of `logits` and at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(dim=-1)


def newest_mask(attention_mask: Any, length: int) -> torch.Tensor | None:
    """Return the last `length` columns of a two-dimensional mask as bool, False at padding; None for other masks.

    With a cache, the mask also covers earlier tokens.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -length:].bool()


def routing_loss(
    config: RemoeConfig, router_logits: tuple[torch.Tensor, ...], token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the L1 term (paper sections 3.3 and 3.4), or top-k's load balancing loss, and the counts of pairs.

    L1 = Σ_layers 1/T · Σ_t Σ_e f_e · R(x_t)_e, with gates R. f_e is E/k times the share of tokens that use expert e, or
    1 without load balancing. The loss of top-k routing has scores in place of R.

    Args:
        config: the model's configuration.
        router_logits: for each layer with experts, `[batch * sequence, num_experts]`.
        token_mask: bool `[batch, sequence]`, False at padding, which does not count.

    Returns:
        The term, a scalar with a gradient; and int64 `[2]`, the numbers of active and of all (token, expert) pairs.
    """
    experts, k, device = config.num_experts, config.mean_experts_per_token, router_logits[0].device
    total, active_pairs, pairs = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device), 0
    for logits in router_logits:
        if token_mask is not None:
            logits = logits[token_mask.reshape(-1).to(logits.device)]
        if config.moe_relu_routing:
            scores = torch.relu(logits).float()
            active = scores > 0
        else:
            scores = score_experts(config, logits)
            active = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k).indices, True)
            if config.scoring_func == "sigmoid":
                scores = scores / (scores.sum(dim=-1, keepdim=True) + TINY)
        tokens, taken = max(len(scores), 1), active.sum(dim=0)
        is_balanced = config.moe_relu_load_balancing or not config.moe_relu_routing
        shares = taken * (experts / (k * tokens)) if is_balanced else 1.0
        total = total + ((shares * scores).sum() / tokens).to(device)
        active_pairs = active_pairs + taken.sum().to(device)
        pairs += scores.numel()
    return total, torch.stack([active_pairs, torch.full_like(active_pairs, pairs)])


def share_of_items(labels: torch.Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
    """Return this micro-batch's share of a step's labels, the weight of its loss in transformers' trainer.

    Args:
        labels: int64 `[batch, sequence]`, -100 where there is none.
        num_items_in_batch: labels of all the step's micro-batches and, by the trainer's default, ranks. None gives 1.
        kwargs: `shift_labels` and `ignore_index`, as in transformers' loss functions.
    """
    if num_items_in_batch is None:
        return 1.0
    shifted = kwargs.get("shift_labels")
    shifted = labels[..., 1:] if shifted is None else shifted
    return (shifted != kwargs.get("ignore_index", -100)).sum() / num_items_in_batch


def _hash32(numbers: torch.Tensor) -> torch.Tensor:
    """Hash the lower 32 bits of int64 numbers, as in training."""
    for _ in range(2):
        numbers = ((numbers >> 16) ^ numbers) * 0x45D9F3B & 0xFFFFFFFF
    return (numbers >> 16) ^ numbers
