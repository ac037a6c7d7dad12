"""Megatron's MoE layer with dispatch for a varying number of experts per token."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.remoe.config import ReMoEConfig
from megatron.remoe.dispatcher import VariableTopkAlltoAllTokenDispatcher


class ReMoELayer(MoELayer):
    """`MoELayer` whose alltoall dispatcher takes any routing map; its router comes with `submodules`."""

    def __init__(
        self,
        config: ReMoEConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        if config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = VariableTopkAlltoAllTokenDispatcher(
                self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
            )
            if self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)
        for parameter in self.experts.parameters():
            # An optimizer of their own for experts: Megatron has it with expert parallelism only, and then cannot load
            # the optimizer's state from a checkpoint without.
            parameter.allreduce = False
