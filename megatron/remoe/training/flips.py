"""Flips: routing decisions that one update of the weights changes, on a fixed calibration set (paper figure 10)."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch

from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_model_config
from megatron.remoe.routing.layers import layer_numbers
from megatron.training.training import disable_forward_pre_hook, enable_forward_pre_hook

Maps = list[tuple[int, torch.Tensor]]  # layer number (from 1) and routing map, bool [tokens, experts]


@dataclass(frozen=True)
class Flips:
    """Routing decisions that one update changed.

    Attributes:
        rate: share of the (token, expert) pairs of all MoE layers that became active or inactive, 0 to 1.
        count: such pairs per token and layer: the rate times the number of experts.
        layer_rate: layer number (from 1) → the rate of that MoE layer.
        changed_tokens: share of tokens, over all MoE layers, that got other experts than before. A token that top-1
            sends to another expert counts once, as one that gains or loses an expert of a ReLU router does; in `rate`
            it counts twice.
    """

    rate: float
    count: float
    layer_rate: dict[int, float]
    changed_tokens: float


class FlipMeter:
    """Routes a calibration set before and after an update; the training does not change by a bit.

    The calibration set is one micro-batch on each data-parallel rank: the first sequences of the validation set, or of
    the training set if there is none. It is routed as in evaluation, with the same input jitter each time.
    """

    def __init__(self, args: argparse.Namespace, forward_step: Callable[..., Any]) -> None:
        """
        Args:
            args: Megatron's arguments; every `moe_log_flips_interval`th update is measured.
            forward_step: as Megatron's loop takes it.
        """
        self._args = args
        self._forward_step = forward_step
        self._chunks: list[torch.nn.Module] = []
        self._batches: list[dict[str, torch.Tensor] | None] = []
        self._before: tuple[int, Maps] | None = None

    def watch(self, model_chunks: list[torch.nn.Module]) -> None:
        """Set the model on this rank, all its virtual pipeline stages."""
        self._chunks = model_chunks

    def calibrate(self, data_sets: list[Any]) -> None:
        """Take this rank's sequences; once for each virtual pipeline stage.

        Args:
            data_sets: training, validation and test set, each None where this rank needs none; the validation set may
                be a list of several.
        """
        train, valid, *_ = data_sets
        data = valid[0] if isinstance(valid, list) and valid else valid or train
        size, rank = self._args.micro_batch_size, mpu.get_data_parallel_rank()
        self._batches.append(
            data
            and torch.utils.data.default_collate(
                [data[number % len(data)] for number in range(rank * size, (rank + 1) * size)]
            )
        )

    def after_update(self, iteration: int) -> Flips | None:
        """Route the calibration set if it is time; call this on every rank after each update.

        Args:
            iteration: number of updates so far.

        Returns:
            What this update changed if it is measured, else None, as for the first update after a start.
        """
        interval = self._args.moe_log_flips_interval
        if iteration % interval not in (0, interval - 1):
            return None
        maps = self._route()
        before, self._before = self._before, (iteration, maps)
        if iteration % interval or before is None or before[0] != iteration - 1:
            return None
        return self._compare(before[1], maps)

    @torch.no_grad()
    def _route(self) -> Maps:
        """Return the routing maps of this rank's routers, in the order of their calls."""
        args, config = self._args, get_model_config(self._chunks[0])
        maps: Maps = []

        def keep(router: TopKRouter, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            maps.append((router.layer_number, output[1].bool()))

        modules = [module for chunk in self._chunks for module in chunk.modules()]
        routers = [module for module in modules if isinstance(module, TopKRouter)]
        numbers = layer_numbers(routers, modules, config.num_layers)
        hooks = [
            router.register_forward_hook(keep)
            for router, number in zip(routers, numbers, strict=True)
            if number <= config.num_layers  # the decoder's
        ]
        timers, config.timers = config.timers, None  # they time the training
        try:
            with _evaluating(self._chunks), _own_random_numbers(args.seed):
                get_forward_backward_func()(
                    forward_step_func=lambda data, model: (self._forward_step(data, model)[0], None),
                    data_iterator=[repeat(batch) for batch in self._batches],
                    model=self._chunks,
                    # Interleaved stages take no fewer.
                    num_microbatches=config.microbatch_group_size_per_vp_stage if len(self._chunks) > 1 else 1,
                    seq_length=args.seq_length,
                    micro_batch_size=args.micro_batch_size,
                    decoder_seq_length=args.decoder_seq_length,
                    forward_only=True,
                )
        finally:
            config.timers = timers
            for hook in hooks:
                hook.remove()
        return maps

    def _compare(self, before: Maps, after: Maps) -> Flips:
        config = get_model_config(self._chunks[0])
        device = next(self._chunks[0].parameters()).device
        table = torch.zeros(config.num_layers, 3, dtype=torch.float64, device=device)
        for (number, was), (_, now) in zip(before, after, strict=True):
            changed = was != now
            table[number - 1, 0] += changed.sum()
            table[number - 1, 1] += now.numel()
            table[number - 1, 2] += changed.any(dim=1).sum()
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(table)  # each rank routed other tokens, or other layers
        rows = {number: row for number, row in enumerate(table.tolist(), start=1) if row[1]}
        flipped, pairs, tokens = (sum(column) for column in zip(*rows.values(), strict=True))
        return Flips(
            rate=flipped / pairs,
            count=flipped / pairs * config.num_moe_experts,
            layer_rate={number: flipped / pairs for number, (flipped, pairs, _) in rows.items()},
            changed_tokens=tokens / pairs * config.num_moe_experts,
        )


def flips_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield what cannot be combined with --moe-log-flips-interval, with flag, value, remedy and code."""
    interval = args.moe_log_flips_interval
    if interval is None:
        return
    given = f"--moe-log-flips-interval {interval}"
    problems = {
        f"{given}: must be at least 1. Leave it out to measure no flips": interval < 1,
        f"{given}: there are no experts whose routing could change. Leave it out": not args.num_experts,
        f"{given} cannot be used with --cuda-graph-impl {args.cuda_graph_impl}: decisions of routers in a graph are "
        "not seen. Leave it out, or use --cuda-graph-impl none": args.cuda_graph_impl != "none",
        f"{given} cannot be used with --reuse-grad-buf-for-mxfp8-param-ag: the weights are incomplete after an update. "
        "Leave one of them out": args.reuse_grad_buf_for_mxfp8_param_ag,
    }
    yield from (f"{words}. [REMOE-E208]" for words, holds in problems.items() if holds)


@contextmanager
def _evaluating(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Set evaluation mode; weights that the forward pass would gather one by one are gathered before it."""
    # DDP's hooks of --overlap-param-gather, which Megatron sets after the first update that was not skipped.
    gathers = bool(getattr(chunks[0], "remove_forward_pre_hook_handles", None))
    if gathers:
        disable_forward_pre_hook(chunks)
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.train()
        if gathers:
            enable_forward_pre_hook(chunks)


@contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    on_host, on_device = torch.get_rng_state(), torch.cuda.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(on_host)
        torch.cuda.set_rng_state(on_device)
