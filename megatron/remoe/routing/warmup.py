"""Near-dense warm-up of a top-k MoE, to which the paper compares ReMoE: more experts per token in the first steps."""

from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.routing.config import ReMoEConfig


class WarmupTopKRouter(TopKRouter):
    """Megatron's top-k router, whose k is `moe_warmup_topk` in the first `moe_warmup_steps` optimizer steps."""

    config: ReMoEConfig

    def begin_step(self, step: int) -> None:
        """Take the k of an optimizer step.

        Args:
            step: number of the steps before it in the whole training, those before a checkpoint included.
        """
        assert self.config.moe_warmup_topk is not None
        warms_up = step < self.config.moe_warmup_steps
        self.topk = self.config.moe_warmup_topk if warms_up else self.config.moe_router_topk
