"""Counts by name: every column has its own place, and they add up over layers."""

import torch

from megatron.remoe.routing.counts import COLUMNS, RoutingCounts


def test_columns_do_not_overlap() -> None:
    counts = RoutingCounts.zeros(3, torch.device("cpu"), num_layers=2)
    for value, name in enumerate(("tokens_per_expert", *COLUMNS), start=1):
        counts.layer(2)[name].fill_(value)
    assert counts.layer(2).table.tolist() == [1.0, 1.0, 1.0, *range(2, len(COLUMNS) + 2)]
    assert not counts.layer(1).table.any()
    assert counts["tokens"].tolist() == [0.0, 2.0] and counts.active.tolist() == [0.0, 3.0]
    assert torch.equal(counts.total().table, counts.layer(2).table)


def test_forward_passes_add_up() -> None:
    counts = RoutingCounts.zeros(2, torch.device("cpu"))
    for _ in range(2):
        counts.add(torch.tensor([3, 1, 5]), torch.tensor(0.25), 0.5)
    assert counts["tokens_per_expert"].tolist() == [6.0, 2.0]
    assert (counts["tokens"], counts["l1_loss"], counts["micro_batches"], counts.active) == (10.0, 0.5, 1.0, 8.0)
    assert not counts["routers"] and not counts["not_finite"]
