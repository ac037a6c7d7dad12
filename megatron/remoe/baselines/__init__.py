"""Routers that the paper compares with ReLU routing and Megatron lacks, for `--moe-baseline-router`."""

from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.baselines.expert_choice import ExpertChoiceRouter
from megatron.remoe.baselines.expert_threshold import ExpertThresholdRouter
from megatron.remoe.baselines.hash import HashRouter
from megatron.remoe.baselines.null_experts import NullExpertRouter
from megatron.remoe.baselines.random import RandomRouter
from megatron.remoe.baselines.routing_free import RoutingFreeRouter
from megatron.remoe.baselines.sequence_topk import SequenceTopKRouter
from megatron.remoe.baselines.top_p import TopPRouter

# The key is the flag's value.
ROUTERS: dict[str, type[TopKRouter]] = {
    "hash": HashRouter,
    "expert_choice": ExpertChoiceRouter,
    "random": RandomRouter,
    "expert_threshold": ExpertThresholdRouter,
    "top_p": TopPRouter,
    "null_experts": NullExpertRouter,
    "sequence_topk": SequenceTopKRouter,
    "routing_free": RoutingFreeRouter,
}
