"""Test counts by name: each column has its own place, and the sums of a step are views of one tensor."""

import torch

from megatron.remoe.routing.counts import COLUMNS, RoutingCounts, StepSums

CPU = torch.device("cpu")


def test_nothing_overlaps() -> None:
    sums = StepSums.zeros(2, 3, CPU)
    for value, name in enumerate(("tokens_per_expert", *COLUMNS), start=1):
        sums.counts[name][1].fill_(value)
    for value, view in enumerate((sums.guarded, sums.l1_exponent, sums.ranks, sums.not_finite), start=6):
        view.fill_(value)
    assert sums.buffer.tolist() == [*[0.0] * 7, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 6.0, 7.0, 8.0, 9.0]
    assert sums.counts["tokens"].tolist() == [0.0, 2.0] and sums.counts.active.tolist() == [0.0, 3.0]


def test_columns_have_the_order_in_which_routers_write_them() -> None:
    """`relu_routing` of both backends adds to the columns by position."""
    counts = RoutingCounts(torch.tensor([3.0, 1.0, 5.0, 0.25, 0.5, 0.0], dtype=torch.float64))
    assert counts["tokens_per_expert"].tolist() == [3.0, 1.0] and counts.active == 4.0
    assert (counts["tokens"], counts["l1_loss"], counts["micro_batches"]) == (5.0, 0.25, 0.5)
