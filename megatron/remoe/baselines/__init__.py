"""Routers that the paper compares ReLU routing to and Megatron does not have, for `--moe-baseline-router`."""

from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.baselines.expert_choice import ExpertChoiceRouter
from megatron.remoe.baselines.hash import HashRouter
from megatron.remoe.baselines.random import RandomRouter

# By the flag's value.
ROUTERS: dict[str, type[TopKRouter]] = {
    "hash": HashRouter,
    "expert_choice": ExpertChoiceRouter,
    "random": RandomRouter,
}
