"""Baseline routers that Megatron does not have, for `--moe-baseline-router`.

All have a method `routing(logits, padding_mask)`, except `HashRouter`, which uses no logits and also routes padding.
With T tokens (sequence x batch) and E experts:

    logits        `[sequence, batch, E]`, x W in the router's dtype
    padding_mask  bool `[sequence, batch]`, True at padding, which is not routed; or None
    returns       gates `[T, E]`, 0 where the map is False; routing map, bool `[T, E]`
"""

from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.baselines.deco import DecoRouter
from megatron.remoe.baselines.expert_choice import ExpertChoiceRouter
from megatron.remoe.baselines.expert_threshold import ExpertThresholdRouter
from megatron.remoe.baselines.hash import HashRouter
from megatron.remoe.baselines.normalized import NormalizedTopKRouter
from megatron.remoe.baselines.top_p import TopPRouter

# The key is the flag's value.
ROUTERS: dict[str, type[TopKRouter]] = {
    "hash": HashRouter,
    "expert_choice": ExpertChoiceRouter,
    "expert_threshold": ExpertThresholdRouter,
    "top_p": TopPRouter,
    "normalized_top_k": NormalizedTopKRouter,
    "deco": DecoRouter,
}
