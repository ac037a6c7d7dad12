"""Configuration of a ReMoE for transformers, and of the dense and top-k models that it is compared with."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig


@strict
class RemoeConfig(LlamaConfig):
    """`LlamaConfig` with experts that are chosen by ReLU (arXiv 2412.14711), top-k or hash, or without experts.

    Raises:
        StrictDataclassError: experts per token are not 1 to `num_experts`, or settings contradict each other.
    """

    model_type = "remoe"
    _auto_class = "AutoConfig"

    qk_norm: Literal["head", "all_heads"] | None = None
    """Queries and keys have an RMSNorm: of each "head" (Qwen3), or one of "all_heads" (OLMoE)."""
    kv_lora_rank: int | None = None
    """Latent attention (DeepSeek-V2): size of the latents of keys and values; None: grouped queries. `head_dim` is then
    `qk_rope_head_dim`; transformers before 5.16 reads `qk_head_dim`."""
    q_lora_rank: int | None = None
    """Latent attention: size of the latents of queries; None: they have none."""
    qk_nope_head_dim: int = 0
    """Latent attention: part of a head's queries and keys that is not rotated."""
    qk_rope_head_dim: int = 0
    """Latent attention: the rotated part, whose keys all heads share."""
    v_head_dim: int = 0
    """Latent attention: size of a head's values."""
    rope_interleave: bool = True
    """Latent attention: rotate adjacent dimensions as pairs, instead of the two halves."""
    num_experts: int = 0
    """Experts of a layer, granularity included; 0: a dense model."""
    num_experts_per_tok: int = 1
    """k: the experts of each token, with ReLU routing the mean that L1 aims at."""
    moe_intermediate_size: int = 0
    """Hidden size of an expert."""
    shared_expert_intermediate_size: int = 0
    """Hidden size of the experts that all tokens share; 0: there are none."""
    shared_expert_gate: bool = False
    """The shared experts have a sigmoid gate (Qwen2-MoE)."""
    mlp_only_layers: tuple[int, ...] | list[int] = ()
    """Layers without experts, from 0."""
    moe_relu_routing: bool = True
    """Gates are ReLU(x W) and an expert is active where its gate is positive; False: top-k of scores."""
    moe_relu_load_balancing: bool = True
    """ReLU routing: the L1 term weighs each expert by its load."""
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    """Top-k routing: scores are a softmax over the experts, or the "sigmoid" of each logit."""
    norm_topk_prob: bool = False
    """Top-k routing: the k gates add up to 1 (Megatron without --moe-router-pre-softmax; sigmoids always, if k > 1)."""
    routed_scaling_factor: float = 1.0
    """Top-k routing: a factor on the gates."""
    router_expert_bias: bool = False
    """Top-k of sigmoids: add a bias to each score, only to choose the experts (arXiv 2408.15664)."""
    hash_routing: bool = False
    """The k experts follow from the token's id, with gates of 1 (arXiv 2106.04426); needs moe_relu_routing False."""
    router_dtype: str | None = None
    """The router's type, for instance "float32"; None: the model's."""
    max_experts_per_token: int | None = None
    """ReLU routing: only the K largest gates count, and K experts are computed for every token, so that shapes are
    fixed for compilers and servers. None: exactly the active experts, however many."""
    target_experts_per_token: int | None = None
    """k, if num_experts_per_tok is K: servers read the number of computed experts there."""
    output_router_logits: bool = False
    """Return router logits, L1 term and sparsity, and add λ times the term to a loss."""
    router_aux_loss_coef: float = 0.0
    """λ, or the coefficient of top-k routing's load balancing loss."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.kv_lora_rank is not None:
            self.head_dim, self.qk_head_dim = self.qk_rope_head_dim, self.qk_nope_head_dim + self.qk_rope_head_dim
        super().__post_init__(**kwargs)
        if self.kv_lora_rank is not None or self.qk_norm == "all_heads":
            self.base_model_tp_plan = None  # type: ignore[misc,assignment]  # both need all heads; Llama's plan splits them

    @property
    def mean_experts_per_token(self) -> int:
        """k: the number of experts per token; with ReLU routing, the mean that the L1 term holds."""
        return self.target_experts_per_token or self.num_experts_per_tok

    def validate_architecture(self) -> None:
        """Check the experts' settings. Unlike in Llama, the number of heads need not divide the hidden size."""
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok}: must be 1 to {self.num_experts}.")
        if self.max_experts_per_token is not None and not 1 <= self.max_experts_per_token <= self.num_experts:
            raise ValueError(f"max_experts_per_token={self.max_experts_per_token}: must be 1 to {self.num_experts}.")
        if self.router_expert_bias and self.scoring_func != "sigmoid":
            raise ValueError("router_expert_bias=True: needs scoring_func='sigmoid'.")
        if self.hash_routing and self.moe_relu_routing:
            raise ValueError("hash_routing=True: needs moe_relu_routing=False.")
