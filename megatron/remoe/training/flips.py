"""Measure flips: routing decisions that an update of the weights changes on a fixed calibration set (figure 10)."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch

from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from megatron.training.training import disable_forward_pre_hook, enable_forward_pre_hook

Maps = list[tuple[int, torch.Tensor]]  # layer number (from 1) and routing map, bool [tokens, experts]


class FlipMeter:
    """Route a calibration set before and after an update; the run's results stay bit for bit the same.

    The calibration set is one micro-batch on each data-parallel rank: the first sequences of the validation set, or of
    the training set if there is none. It is routed as in evaluation, with the same input jitter each time.
    """

    def __init__(self, args: argparse.Namespace, forward_step: Callable[..., Any]) -> None:
        """
        Args:
            args: Megatron's arguments; every `moe_log_flips_interval`th update is measured.
            forward_step: the function that Megatron's loop calls for each micro-batch.
        """
        self.chunks: list[torch.nn.Module] = []  # the model on this rank, with all virtual pipeline stages
        self._args, self._forward_step = args, forward_step
        self._batches: list[dict[str, torch.Tensor] | None] = []
        self._before: tuple[int, Maps] | None = None

    def calibrate(self, data_sets: list[Any]) -> None:
        """Keep this rank's sequences. Call it once for each virtual pipeline stage.

        Args:
            data_sets: training, validation and test set, each None if this rank does not need it; there may be a list
                of several validation sets.
        """
        train, valid, *_ = data_sets
        if isinstance(valid, list):
            valid = valid[0] if valid else None
        data = valid or train
        if not data:
            self._batches.append(None)
            return
        size, rank = self._args.eval_micro_batch_size, mpu.get_data_parallel_rank()
        sequences = [data[number % len(data)] for number in range(rank * size, (rank + 1) * size)]
        self._batches.append(torch.utils.data.default_collate(sequences))

    def after_update(self, iteration: int) -> dict[str, Any] | None:
        """Measure the flips of an update if it is due. Call this on every rank after each update.

        Args:
            iteration: number of updates so far.

        Returns:
            None if this update is not measured; the first update after a start never is. Otherwise
            - "rate": share of the (token, expert) pairs of the decoder's MoE layers that became active or inactive;
            - "count": number of such pairs per token and layer;
            - "layer_rate": layer number (from 1) → the rate of that layer;
            - "changed_tokens": share of tokens, over all MoE layers, whose set of experts changed. If top-1 sends a
              token to a different expert, it counts once here and twice in the rate.
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
        """Return the routing maps of this rank's routers in the decoder, in the order of their calls."""
        args, config = self._args, get_model_config(self.chunks[0])
        maps: Maps = []

        def keep(router: TopKRouter, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            maps.append((router.layer_number, output[1].bool()))

        decoders = [get_attr_wrapped_model(chunk, "decoder") for chunk in self.chunks]  # without multi-token prediction
        modules = [module for decoder in decoders for module in decoder.modules()]
        hooks = [module.register_forward_hook(keep) for module in modules if isinstance(module, TopKRouter)]
        with _evaluation_state(self.chunks, args.seed):
            get_forward_backward_func()(
                forward_step_func=lambda data, model: (self._forward_step(data, model)[0], None),
                data_iterator=[repeat(batch) for batch in self._batches],
                model=self.chunks,
                # The interleaved schedule needs at least this many micro-batches.
                num_microbatches=config.microbatch_group_size_per_vp_stage if len(self.chunks) > 1 else 1,
                seq_length=args.seq_length,
                micro_batch_size=args.eval_micro_batch_size,
                decoder_seq_length=args.decoder_seq_length,
                forward_only=True,
            )
        for hook in hooks:
            hook.remove()
        return maps

    def _compare(self, before: Maps, after: Maps) -> dict[str, Any]:
        """Return the figures of `after_update` from the maps before and after it."""
        config = get_model_config(self.chunks[0])
        device = next(self.chunks[0].parameters()).device
        # A row per layer: flipped pairs, all pairs, tokens with a flipped pair.
        table = torch.zeros(config.num_layers, 3, dtype=torch.float64, device=device)
        for (number, was), (_, now) in zip(before, after, strict=True):
            changed = was != now
            table[number - 1, 0] += changed.sum()
            table[number - 1, 1] += now.numel()
            table[number - 1, 2] += changed.any(dim=1).sum()
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(table)  # ranks route different tokens, or different layers
        rows = {number: row for number, row in enumerate(table.tolist(), start=1) if row[1]}
        flipped, pairs, changed_tokens = map(sum, zip(*rows.values(), strict=True))
        tokens = pairs / config.num_moe_experts
        return {
            "rate": flipped / pairs,
            "count": flipped / tokens,
            "layer_rate": {number: row[0] / row[1] for number, row in rows.items()},
            "changed_tokens": changed_tokens / tokens,
        }


@contextmanager
def _evaluation_state(chunks: list[torch.nn.Module], seed: int) -> Iterator[None]:
    """Set evaluation mode and a random seed, and turn off timers; restore everything at the end."""
    config = get_model_config(chunks[0])
    timers, on_host, on_device = config.timers, torch.get_rng_state(), torch.cuda.get_rng_state()
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    # With --overlap-param-gather, DDP's hooks gather weights one by one in the forward pass; Megatron sets these hooks
    # after the first update that was not skipped. Gather all weights before this forward pass.
    gathers = bool(getattr(chunks[0], "remove_forward_pre_hook_handles", None))
    if gathers:
        disable_forward_pre_hook(chunks)
    for chunk in chunks:
        chunk.eval()
    config.timers = None
    torch.manual_seed(seed)
    if all(map(torch.is_tensor, states.values())):  # random routing draws from them; --te-rng-tracker holds generators
        tracker.set_states(dict.fromkeys(states, torch.cuda.get_rng_state()))
    try:
        yield
    finally:
        tracker.set_states(states)
        torch.set_rng_state(on_host)
        torch.cuda.set_rng_state(on_device)
        config.timers = timers
        for chunk in chunks:
            chunk.train()
        if gathers:
            enable_forward_pre_hook(chunks)
