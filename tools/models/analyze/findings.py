"""Count how a model routes its tokens, and compute the statistics of each file and picture."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron.remoe.hf import RemoeForCausalLM

from ...console.display import show_step
from ...runs.run_figures import INACTIVE
from ..measuring import compute_logits, summarize_experts, watch_routers
from ..text import read_batches

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

MIN_OCCURRENCES = 10  # of a token that is shown by itself
SHOWN_TOKENS = 8

Numbers = dict[str, Any]


class Counts:
    """Sums over tokens, for D data sets, L layers with experts, E experts, and V tokens in the vocabulary.

    Args:
        layers: numbers of the layers, from 1. `[L]`
        domains: D.
        experts: E.
        vocabulary: V.
    """

    def __init__(self, layers: Sequence[int], domains: int, experts: int, vocabulary: int) -> None:
        zeros, number = partial(torch.zeros, dtype=torch.int64), len(layers)
        self.layers = [*layers]
        self.routed = zeros(domains, number, experts)  # pairs of a token and an active expert
        self.histogram = zeros(domains, number, experts + 1)  # tokens with 0, 1, 2, ... experts
        self.by_token = zeros(number, vocabulary, experts, dtype=torch.int32)
        self.occurrences = zeros(vocabulary)

    @property
    def tokens(self) -> torch.Tensor:
        """Return the number of tokens of each data set, int64 `[D]`."""
        return self.histogram[:, 0].sum(dim=-1)

    def add(self, domain: int, ids: torch.Tensor, place: int, active: torch.Tensor) -> None:
        """Count the routing of some tokens in one layer.

        Args:
            domain: index of the data set.
            ids: int64 `[tokens]`.
            place: index of the layer among those with experts.
            active: bool `[tokens, experts]`.
        """
        self.routed[domain, place] += active.sum(dim=0)
        self.histogram[domain, place] += torch.bincount(active.sum(dim=-1), minlength=active.shape[-1] + 1)
        self.by_token[place].index_add_(0, ids, active.int())
        if place == 0:
            self.occurrences += torch.bincount(ids, minlength=len(self.occurrences))


@torch.inference_mode()
def count_routing(
    model: RemoeForCausalLM, texts: Sequence["GPTDataset"], layers: list[int], limit: int | None
) -> Counts:
    """Run the model over at most `limit` sequences of each domain's text, and return its counts."""
    counts = Counts(layers, len(texts), model.config.num_experts, model.config.vocab_size)
    seen: list[torch.Tensor] = []
    with watch_routers(model, lambda _number, active: seen.append(active.cpu())):
        for domain, text in enumerate(texts):
            with show_step(Path(text.dataset_path).name, min(len(text), limit or len(text))) as advance:
                for batch in read_batches(text, limit, model.config.vocab_size):
                    ids = batch[:, :-1]
                    compute_logits(model, ids.to(model.device))
                    for place, active in enumerate(seen):
                        counts.add(domain, ids.flatten(), place, active)
                    seen.clear()
                    advance(len(batch))
    return counts


def experts_per_token(counts: Counts) -> Numbers:
    """Return layer → experts per token, and experts per token by the token's frequency (figure 7)."""
    layers = {}
    for layer, histogram in zip(counts.layers, counts.histogram.sum(dim=0), strict=True):
        share = (histogram.double() / histogram.sum()).tolist()
        layers[layer] = summarize_experts(histogram) | {"none": share[0], "histogram": share}
    return {"layers": layers, "by_frequency": _by_frequency(counts)}


def _by_frequency(counts: Counts) -> Numbers:
    shown = (counts.occurrences >= MIN_OCCURRENCES).nonzero()[:, 0]
    occurrences = counts.occurrences[shown]
    frequency = occurrences.double() / counts.occurrences.sum()
    experts = counts.by_token.sum(dim=-1)[:, shown] / occurrences.double()
    experts = torch.cat([experts, experts.mean(dim=0, keepdim=True)])
    result: Numbers = {"least_occurrences": MIN_OCCURRENCES}
    rows = zip(shown.tolist(), frequency.tolist(), experts[-1].tolist(), strict=True)
    result["tokens"] = [{"token": token, "frequency": share, "experts": number} for token, share, number in rows]
    if len(frequency.unique()) > 1 and experts.min() < experts.max():  # top-k gives all tokens the same number
        tenfold = frequency.log10() - frequency.log10().mean()
        slopes = experts @ tenfold / tenfold.square().sum()  # slopes of lines fitted by least squares
        result["slopes"] = dict(zip([*counts.layers, "mean"], slopes.tolist(), strict=True))
    return result


def load(counts: Counts, names: Sequence[str], even: float, token_text: Callable[[int], str | None]) -> Numbers:
    """Return the experts' load and specialization by data set (figures 8, 9, 11, 12), and their top tokens (table 12).

    Args:
        names: of the data sets.
        even: share of the tokens that each expert gets if all get the same, at the target sparsity.
        token_text: returns a token's text, or None without a tokenizer.
    """
    shares = counts.routed / counts.tokens[:, None, None].double()
    result: Numbers = {"even": even, "domains": {}, "specialization": None}
    for name, tokens, rows in zip(names, counts.tokens.tolist(), shares, strict=True):
        result["domains"][name] = {
            "tokens": tokens,
            "load": dict(zip(counts.layers, rows.tolist(), strict=True)),
            "experts_per_token": dict(zip(counts.layers, rows.sum(dim=-1).tolist(), strict=True)),
        }
    if len(names) > 1:
        result["specialization"] = dict(zip(counts.layers, information(counts.routed).tolist(), strict=True))
    result["tokens"] = {layer: _list_tokens(counts, place, token_text) for place, layer in enumerate(counts.layers)}
    return result


def information(routed: torch.Tensor) -> torch.Tensor:
    """Return the mutual information of expert and data set in bits; all data sets have the same weight.

    Args:
        routed: pairs, `[data sets, layers, experts]`.

    Returns:
        float64 `[layers]`, from 0 (the same load in all data sets) to log2(data sets).
    """
    pairs = routed.double()
    total = pairs.sum(dim=-1, keepdim=True)
    share, filled = pairs / total.clamp(min=1), (total > 0).sum(dim=0).clamp(min=1)
    mean = share.sum(dim=0) / filled
    terms = torch.where(share > 0, share * (share / mean).log2(), 0.0)
    return terms.sum(dim=(0, 2)) / filled[:, 0]


def _list_tokens(counts: Counts, place: int, token_text: Callable[[int], str | None]) -> list[list[Numbers]]:
    """Return, for each expert of a layer, the tokens it gets most often; of equal ones, the more frequent first."""
    often = counts.occurrences.argsort(descending=True, stable=True)
    often = often[counts.occurrences[often] >= MIN_OCCURRENCES]
    shares = counts.by_token[place][often].double() / counts.occurrences[often, None]
    first = shares.argsort(dim=0, descending=True, stable=True)[:SHOWN_TOKENS]
    return [
        [
            {"token": token, "text": token_text(token), "share": share, "occurrences": int(counts.occurrences[token])}
            for token, share in zip(often[rows].tolist(), shares[rows, expert].tolist(), strict=True)
            if share
        ]
        for expert, rows in enumerate(first.T)
    ]


def balance(counts: Counts, topk: int) -> Numbers:
    """Return the target sparsity and, for each layer, sparsity (figure 8d), imbalance, and idle experts.

    Args:
        topk: k of the target sparsity.
    """
    tokens, routed = int(counts.tokens.sum()), counts.routed.sum(dim=0)
    experts = routed.shape[1]
    layers = {}
    for layer, row in zip(counts.layers, routed, strict=True):
        mean = row.double().mean()
        layers[layer] = {
            "sparsity": 1 - int(row.sum()) / (tokens * experts),
            "imbalance": float(row.max() / mean) if mean else None,  # the largest load over the mean
            "dead": (row == 0).nonzero()[:, 0].tolist(),
            "inactive": (row < INACTIVE * tokens * topk / experts).nonzero()[:, 0].tolist(),
        }
    return {"target": 1 - topk / experts, "layers": layers}
