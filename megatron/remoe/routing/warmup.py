"""Near-dense warm-up of a top-k MoE, a baseline of the paper: more experts per token in the first steps."""

from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.routing.config import ReMoEConfig


class WarmupTopKRouter(TopKRouter):
    """Megatron's top-k router with k = `moe_warmup_topk` in the first `moe_warmup_steps` optimizer steps."""

    config: ReMoEConfig

    def begin_step(self, step: int) -> None:
        """Set the k of an optimizer step.

        Args:
            step: optimizer steps before this one, including those before a checkpoint.
        """
        assert self.config.moe_warmup_topk is not None
        warms_up = step < self.config.moe_warmup_steps
        self.topk = self.config.moe_warmup_topk if warms_up else self.config.moe_router_topk
