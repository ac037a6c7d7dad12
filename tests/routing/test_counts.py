"""Counts by name: every column has its own place, and the sums of a step are views of one tensor."""

import torch

from megatron.remoe.routing.counts import COLUMNS, RoutingCounts, StepSums

CPU = torch.device("cpu")


def test_nothing_overlaps() -> None:
    sums = StepSums.zeros(2, 3, CPU)
    for value, name in enumerate(("tokens_per_expert", *COLUMNS), start=1):
        sums.counts.layer(2)[name].fill_(value)
    for value, view in enumerate((sums.guarded, sums.l1_exponent, sums.ranks, sums.not_finite), start=5):
        view.fill_(value)
    assert sums.buffer.tolist() == [*[0.0] * 6, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 6.0, 7.0, 8.0]
    assert sums.counts["tokens"].tolist() == [0.0, 2.0] and sums.counts.active.tolist() == [0.0, 3.0]


def test_a_router_writes_pairs_tokens_loss_and_micro_batches_in_this_order() -> None:
    """kernels/router.py adds to the columns by their places."""
    counts = RoutingCounts.zeros(2, CPU)
    counts.add(torch.tensor([3, 1, 5]), torch.tensor(0.25), 0.5)
    assert counts.table.tolist() == [3.0, 1.0, 5.0, 0.25, 0.5]


def test_forward_passes_add_up() -> None:
    counts = RoutingCounts.zeros(2, CPU)
    for _ in range(2):
        counts.add(torch.tensor([3, 1, 5]), torch.tensor(0.25), 0.5)
    assert counts["tokens_per_expert"].tolist() == [6.0, 2.0]
    assert (counts["tokens"], counts["l1_loss"], counts["micro_batches"], counts.active) == (10.0, 0.5, 1.0, 8.0)
