"""Megatron's transformer configuration with the settings of ReLU routing and of the baseline routers."""

from dataclasses import dataclass, fields
from typing import Literal

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.remoe.routing.refusals import routing_problems

Baseline = Literal["hash", "expert_choice", "expert_threshold", "top_p", "normalized_top_k", "deco"]


@dataclass
class ReMoEConfig(TransformerConfig):
    """`TransformerConfig` with ReLU routing. Each field is also a command-line flag; its docstring is the help text.

    `num_moe_experts`, `moe_router_topk` (k) and `moe_ffn_hidden_size` are the values after granularity. The target
    sparsity is `1 - k / num_moe_experts`.

    Raises:
        ValueError: a value is out of range, or the router refuses a setting (`routing_problems`).
    """

    moe_relu_routing: bool = False
    """Route by ReLU(x W) instead of top-k of a softmax: each token uses the experts with a positive gate, and an
    adaptive L1 term keeps the sparsity at 1 - topk/experts."""

    moe_relu_l1_reg_coeff_init: float = 1e-8
    """Initial coefficient of the L1 term (default %(default)s). A larger one, up to 1e-4, reaches the target sooner."""

    moe_relu_l1_reg_coeff_multiplier: float = 1.2
    """Factor by which the coefficient grows or shrinks once per step (default %(default)s). A larger one, up to 1.3,
    reaches the target sooner and swings more."""

    moe_relu_l1_reg_load_balancing: bool = True
    """Weigh each expert's gates in the L1 term by its share of the tokens, which balances the load (default); otherwise
    weigh all equally (f_e = 1, the paper's equation 9)."""

    moe_relu_sparsity_scope: Literal["model", "layer"] = "model"
    """Hold the mean sparsity of all layers at the target with one L1 coefficient (model, the paper's, default), or that
    of each layer with its own coefficient (layer)."""

    moe_relu_normalize: bool = False
    """Divide each token's logits by their length before ReLU, and multiply the gates by a learned scale
    (arXiv 2605.06665), so gates do not depend on the size of the logits."""

    moe_relu_layer_floor: float = 1e-3
    """Keep layers alive: a layer with fewer active experts per token than this share of topk is freed from the L1 term,
    and its gates are pushed up (default %(default)s; 0 turns it off)."""

    moe_relu_max_experts: int | None = None
    """Compute at most this many experts per token, those with the largest gates, in training and evaluation. The L1
    term and the sparsity still count all positive gates. Limits FLOPs, memory and traffic of the dense start
    (recommended with at least 32 times topk experts: 4 times topk)."""

    moe_relu_activation_limit: float = 2.0
    """Limit memory while routing is dense: a layer holds the activations of at most this many times topk experts per
    token. Beyond that, it runs in chunks that the backward pass recomputes; results do not change (default %(default)s;
    0: no limit)."""

    moe_granularity: int = 1
    """Split every expert into this many smaller ones: multiplies experts and topk, divides the experts' hidden size;
    FLOPs and target sparsity stay the same (default %(default)s). For ReLU and top-k routing."""

    moe_kernels: Literal["torch", "triton"] = "torch"
    """Backend of router, dispatch and activation, for ReLU and top-k routing: PyTorch's operations, or this project's
    Triton kernels, which need a GPU and have not been run on one yet (default %(default)s)."""

    moe_warmup_topk: int | None = None
    """Near-dense warm-up of top-k routing, as in the paper's comparison: experts per token in the first steps (e.g. 6
    of 8), before --moe-router-topk."""

    moe_warmup_steps: int = 0
    """Optimizer steps of the near-dense warm-up (e.g. 100)."""

    moe_baseline_router: Baseline | None = None
    """Use a different router instead of top-k: hash (by the token's id), expert_choice (experts choose tokens and see
    the future of their sequence), normalized_top_k (of normalized ReLU gates, arXiv 2605.06665); with a number of
    experts that varies around topk: expert_threshold (arXiv 2603.11535), top_p (arXiv 2512.13996). With
    --moe-relu-routing: deco (an entropy instead of L1, and a scale for each expert, arXiv 2605.10933)."""

    def __post_init__(self) -> None:
        if problems := routing_problems(self):
            raise ValueError("\n".join(problems))
        if self.moe_relu_routing or self.moe_baseline_router:
            # Megatron requires it for k = 1: a softmax over one score is constant. These routers have no such softmax.
            self.moe_router_pre_softmax = True
            if hasattr(self, "moe_hybridep_routing_map_mode"):
                # Versions after 0.19.2 send the k largest gates of each token by default ("indices").
                self.moe_hybridep_routing_map_mode = "bool"
        super().__post_init__()
        if problems := routing_problems(self):  # Megatron has translated deprecated settings: check again
            raise ValueError("\n".join(problems))

    @property
    def target_sparsity(self) -> float:
        """The share of (token, expert) pairs that should be inactive: 1 - k/E (paper section 3.3)."""
        assert self.num_moe_experts is not None
        return 1.0 - self.moe_router_topk / self.num_moe_experts


@dataclass
class ReMoEMLAConfig(MLATransformerConfig, ReMoEConfig):
    """`ReMoEConfig` with multi-head latent attention and the defaults of `MLATransformerConfig`."""

    def __post_init__(self) -> None:
        self.multi_latent_attention = True
        super().__post_init__()


MEGATRON_FIELDS = [field.name for field in fields(TransformerConfig)]
