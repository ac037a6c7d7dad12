"""Compute statistics from the counts: one dictionary for each file and picture."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...runs.run_figures import INACTIVE
from ..expert_counts import summarize_experts
from .arguments import WINDOW
from .counts import OCTAVES, PER_OCTAVE, Counts

LEAST = 10  # occurrences of a token that is shown by itself
RESAMPLES = 1000
SHUFFLES = 200
SHOWN_TOKENS = 8
PERCENTILES = {"percentile_10": 0.1, "median": 0.5, "percentile_90": 0.9}

Numbers = dict[str, Any]


def by_layer(layers: Sequence[Any], **columns: torch.Tensor) -> dict[Any, dict[str, Any]]:
    """Return layer → name → value, from tensors `[L]`; None for NaN."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return {
        layer: {name: None if math.isnan(value) else value for name, value in zip(columns, row, strict=True)}
        for layer, row in zip(layers, rows, strict=True)
    }


def experts_per_token(counts: Counts) -> Numbers:
    """Return layer → experts per token, and experts per token by the token's frequency (figure 7)."""
    layers = {}
    for layer, histogram in zip(counts.layers, counts.histogram.sum(dim=0), strict=True):
        share = (histogram.double() / histogram.sum()).tolist()
        layers[layer] = summarize_experts(histogram) | {"none": share[0], "histogram": share}
    return {"layers": layers, "by_frequency": _by_frequency(counts)}


def _by_frequency(counts: Counts) -> Numbers:
    shown = (counts.occurrences >= LEAST).nonzero()[:, 0]
    occurrences = counts.occurrences[shown]
    frequency = occurrences.double() / counts.occurrences.sum()
    experts = counts.by_token.sum(dim=-1)[:, shown] / occurrences.double()
    experts = torch.cat([experts, experts.mean(dim=0, keepdim=True)])
    tokens = by_layer(shown.tolist(), frequency=frequency, experts=experts[-1])
    found: Numbers = {"least_occurrences": LEAST, "resamples": RESAMPLES}
    found["tokens"] = [{"token": token} | values for token, values in tokens.items()]
    if len(frequency.unique()) > 1 and experts.min() < experts.max():  # top-k gives all tokens the same
        slope, low, high = slopes_with_intervals(frequency.log10(), experts)
        found["slopes"] = by_layer([*counts.layers, "mean"], slope=slope, low=low, high=high)
    return found


def slopes_with_intervals(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return least-squares slopes with their 95 % bootstrap intervals.

    Args:
        x: float64 `[points]`, not all equal.
        y: float64 `[lines, points]`.

    Returns:
        slope, low, high: float64 `[3, lines]`.
    """

    def slopes(weights: torch.Tensor) -> torch.Tensor:
        centred = weights * (x - weights @ x / weights.sum())
        return y @ centred / (centred @ x)

    generator, number = torch.Generator().manual_seed(0), len(x)
    draws = (torch.randint(number, (number,), generator=generator) for _ in range(RESAMPLES))
    resampled = torch.stack([slopes(torch.bincount(draw, minlength=number).double()) for draw in draws])
    bounds = resampled.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return torch.stack([slopes(torch.ones_like(x)), *bounds])


def load(counts: Counts, names: Sequence[str], even: float, text_of: Callable[[int], str | None]) -> Numbers:
    """Return each expert's share of a data set's tokens (figures 8, 9 and 11), experts per token (figure 12), mutual
    information of data set and expert, and the tokens that an expert gets most often (table 12).

    Args:
        names: of the data sets.
        even: each expert's share if all got the same, at the target.
        text_of: returns a token's text, or None without a tokenizer.
    """
    shares = counts.routed.sum(dim=1) / counts.tokens[:, None, None].double()
    found: Numbers = {"even": even, "domains": {}, "specialization": None}
    for name, tokens, rows in zip(names, counts.tokens.tolist(), shares, strict=True):
        found["domains"][name] = {
            "tokens": tokens,
            "load": dict(zip(counts.layers, rows.tolist(), strict=True)),
            "experts_per_token": dict(zip(counts.layers, rows.sum(dim=-1).tolist(), strict=True)),
        }
    if len(names) > 1:
        bits, (mean, percentile) = information(counts.routed.sum(dim=1)), _shuffled(counts)
        per_token = information_per_token(counts)
        columns = {"bits": bits, "shuffled": mean, "shuffled_95": percentile, "bits_per_token": per_token}
        found["specialization"] = by_layer(counts.layers, **columns)
    found["tokens"] = {layer: _tokens_of(counts, place, text_of) for place, layer in enumerate(counts.layers)}
    return found


def information(routed: torch.Tensor) -> torch.Tensor:
    """Return the mutual information of expert and data set in bits; all data sets have the same weight.

    Args:
        routed: pairs, `[data sets, layers, experts]`.

    Returns:
        float64 `[layers]`, from 0 (the same load in all data sets) to log2(data sets).
    """
    pairs = routed.double()
    total = pairs.sum(dim=-1, keepdim=True)
    share, some = pairs / total.clamp(min=1), (total > 0).sum(dim=0).clamp(min=1)
    mean = share.sum(dim=0) / some
    terms = torch.where(share > 0, share * (share / mean).log2(), 0.0)
    return terms.sum(dim=(0, 2)) / some[:, 0]


def information_per_token(counts: Counts) -> torch.Tensor:
    """Return the information on the data set of all a token's experts, as if they were independent, in bits.

    A token without an expert is an event like an active pair: the information of an event times a token's events. With
    top-1 it equals `information`.

    Returns:
        float64 `[layers]`.
    """
    events = torch.cat([counts.routed.sum(dim=1), counts.histogram[..., :1]], dim=-1)
    per_token = events.sum(dim=-1).double() / counts.histogram.sum(dim=-1).clamp(min=1)
    return information(events) * per_token.mean(dim=0)


def _shuffled(counts: Counts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and 95th percentile of `information` after shuffling the parts of all data sets.

    Parts that are not full are left out. NaN if a data set has no full part.
    """
    domains, parts = counts.routed.shape[:2]
    full = torch.arange(parts) < (counts.sequences // counts.part_sequences)[:, None]
    if not full[:, 0].all():
        unknown = torch.full((len(counts.layers),), torch.nan, dtype=torch.float64)
        return unknown, unknown
    labels, routed = full.nonzero()[:, 0], counts.routed[full].double()  # exact, and sums are matrix products
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(SHUFFLES):
        dealt = labels[torch.randperm(len(labels), generator=generator)]
        groups = torch.nn.functional.one_hot(dealt, domains).T.double() @ routed.flatten(1)
        found.append(information(groups.unflatten(1, routed.shape[1:])))
    bits = torch.stack(found)
    return bits.mean(dim=0), bits.quantile(0.95, dim=0)


def _tokens_of(counts: Counts, place: int, text_of: Callable[[int], str | None]) -> list[list[Numbers]]:
    """Return for each expert of a layer the tokens with the largest share going to it, frequent ones first."""
    often = counts.occurrences.argsort(descending=True, stable=True)
    often = often[counts.occurrences[often] >= LEAST]
    shares = counts.by_token[place][often].double() / counts.occurrences[often, None]
    first = shares.argsort(dim=0, descending=True, stable=True)[:SHOWN_TOKENS]
    return [
        [
            {"token": token, "text": text_of(token), "share": share, "occurrences": int(counts.occurrences[token])}
            for token, share in zip(often[rows].tolist(), shares[rows, expert].tolist(), strict=True)
            if share
        ]
        for expert, rows in enumerate(first.T)
    ]


def losses(counts: Counts) -> Numbers:
    """Return mean losses by a token's experts, summed over layers, and the correlation of both by layer.

    "own" is the loss of the token itself, when it was predicted; "next" that of the token after it, which its experts
    help to predict. A correlation is None if all tokens have the same number of experts.
    """
    tokens, sums = counts.by_experts[0], counts.by_experts[1:]
    number, total = torch.arange(tokens.shape[1], dtype=torch.float64), tokens.sum(dim=1)
    mean, means = tokens @ number / total, sums.sum(dim=2) / total
    spread = (tokens @ number.square() / total - mean.square()).clamp(min=0).sqrt()
    deviations = (counts.loss_squares[:, None] / total - means.square()).clamp(min=0).sqrt()
    own, following = ((sums @ number) / total - mean * means) / (spread * deviations)
    found = torch.stack([number, tokens[-1], *(sums[:, -1] / tokens[-1])], dim=1)[tokens[-1] > 0]
    return {
        "correlation": by_layer([*counts.layers, "all"], own=own, next=following),
        "experts": [dict(zip(("experts", "tokens", "own", "next"), row, strict=True)) for row in found.tolist()],
    }


def balance(counts: Counts, topk: int, ranks: int) -> Numbers:
    """Return layer → sparsity (figure 8d), load imbalance, experts without tokens, and the same for ranks.

    Args:
        topk: k of the target sparsity.
        ranks: expert-parallel ranks, each with the next experts.
    """
    tokens, routed = int(counts.tokens.sum()), counts.routed.sum(dim=(0, 1))
    experts = routed.shape[1]
    found: Numbers = {"target": 1 - topk / experts, "expert_parallel": ranks, "layers": {}}
    for layer, row in zip(counts.layers, routed, strict=True):
        found["layers"][layer] = {
            "sparsity": 1 - int(row.sum()) / (tokens * experts),
            "imbalance": _largest_over_even(row),
            "relative_load": (row / row.double().mean().clamp(min=1e-30)).tolist(),
            "dead": (row == 0).nonzero()[:, 0].tolist(),
            "inactive": (row < INACTIVE * tokens * topk / experts).nonzero()[:, 0].tolist(),
            "rank_imbalance": _largest_over_even(row.view(ranks, -1).sum(dim=1)),
        }
    return found


def _largest_over_even(load: torch.Tensor) -> float | None:
    """Return the largest load relative to the mean; None without any load."""
    return float(load.max() / load.double().mean()) if load.any() else None


def neighbours(counts: Counts) -> Numbers:
    """Return layer → experts shared with the previous token, and different experts of `WINDOW` tokens.

    Chance is for random tokens of the same data set.
    """
    share = counts.routed.sum(dim=1) / counts.tokens[:, None, None].double()
    common_by_chance = ((counts.tokens - counts.sequences)[:, None] * share.square().sum(dim=-1)).sum(dim=0)
    union_by_chance = (counts.windows[:, None] * (1 - (1 - share) ** WINDOW).sum(dim=-1)).sum(dim=0)
    pairs, windows = counts.followers.sum(dim=0).clamp(min=1), counts.windows.sum()
    layers = by_layer(
        counts.layers,
        common=counts.common.sum(dim=0).double() / pairs,
        common_by_chance=common_by_chance / pairs,
        union=counts.union.sum(dim=0).double() / windows,
        union_by_chance=union_by_chance / windows,
    )
    return {"window": WINDOW, "layers": layers}


def gates(counts: Counts) -> Numbers:
    """Return layer → size of active gates, and the largest gate's share of a token's gates and of its output.

    Percentiles are exact to about 1 %. A layer without an active gate has None.
    """
    sizes, tokens = counts.gates.cumsum(dim=1), counts.histogram[:, :, 1:].sum(dim=(0, 2))
    number = sizes[:, -1]
    classes = {name: torch.searchsorted(sizes.double(), (number * q)[:, None])[:, 0] for name, q in PERCENTILES.items()}
    columns = {
        "mean": counts.gate_sum / number,
        **{name: 2 ** (OCTAVES.start + of.double() / PER_OCTAVE) for name, of in classes.items()},
        "largest_gate": counts.largest_gate / tokens,
        "largest_output": counts.largest_output / tokens,
    }
    found = by_layer(counts.layers, **columns)
    return {"layers": {layer: None if values["mean"] is None else values for layer, values in found.items()}}
