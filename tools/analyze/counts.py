"""Count how a model routes its tokens."""

from dataclasses import dataclass
from typing import Self

import torch

PARTS = 1024  # of a data set, at most; an even number
WINDOW = 8  # tokens, as speculative decoding checks them at once
OCTAVES, PER_OCTAVE = range(-24, 8), 32  # of gates


@dataclass
class Counts:
    """Sums over tokens: int64 but for those of gates and shares, which are float64.

    D data sets, P parts of each, L layers with experts, E experts, V tokens of the vocabulary, C classes of gates.
    A part is `part_sequences` sequences in a row, the same number in all data sets, so that parts can be shuffled.

    Attributes:
        layers: their numbers from 1. `[L]`
        sequences: that were read. `[D]`
        part_sequences: of a part, twice as many whenever a data set fills all its parts. `[]`
        routed: pairs of a token and an expert that is active for it. `[D, P, L, E]`
        histogram: tokens with 0, 1, 2, ... experts. `[D, L, E + 1]`
        common: pairs whose expert the token before has too. `[D, L]`
        followers: pairs of tokens that have one before. `[D, L]`
        union: different experts of `WINDOW` tokens, over all windows. `[D, L]`
        windows: their number. `[D]`
        gates: active gates by size. `[L, C]`
        gate_sum: of active gates. `[L]`
        largest_gate: the largest gate's share of a token's gates, over tokens with experts. `[L]`
        largest_output: the same of its part in the output, see `routing.observe_routing`. `[L]`
        by_token: pairs by token and expert, int32. `[L, V, E]`
        occurrences: of each token. `[V]`
    """

    layers: torch.Tensor
    sequences: torch.Tensor
    part_sequences: torch.Tensor
    routed: torch.Tensor
    histogram: torch.Tensor
    common: torch.Tensor
    followers: torch.Tensor
    union: torch.Tensor
    windows: torch.Tensor
    gates: torch.Tensor
    gate_sum: torch.Tensor
    largest_gate: torch.Tensor
    largest_output: torch.Tensor
    by_token: torch.Tensor
    occurrences: torch.Tensor

    @classmethod
    def zeros(cls, layers: list[int], domains: int, experts: int, vocabulary: int) -> Self:
        """Return counts of nothing yet."""

        def new(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype)

        number = len(layers)
        return cls(
            layers=torch.tensor(layers),
            sequences=new(domains),
            part_sequences=torch.tensor(1),
            routed=new(domains, PARTS, number, experts),
            histogram=new(domains, number, experts + 1),
            common=new(domains, number),
            followers=new(domains, number),
            union=new(domains, number),
            windows=new(domains),
            gates=new(number, len(OCTAVES) * PER_OCTAVE),
            gate_sum=new(number, dtype=torch.float64),
            largest_gate=new(number, dtype=torch.float64),
            largest_output=new(number, dtype=torch.float64),
            by_token=new(number, vocabulary, experts, dtype=torch.int32),
            occurrences=new(vocabulary),
        )

    def add_text(self, domain: int, ids: torch.Tensor) -> None:
        """Count sequences of a data set, after all layers have: int64 `[batch, length]`."""
        self.sequences[domain] += len(ids)
        self.windows[domain] += len(ids) * (ids.shape[1] // WINDOW)
        self.occurrences += torch.bincount(ids.flatten(), minlength=len(self.occurrences))

    def add_layer(
        self, domain: int, ids: torch.Tensor, layer: int, gates: torch.Tensor, largest_output: torch.Tensor
    ) -> None:
        """Count what a layer does with the next sequences of a data set.

        Args:
            domain: the data set's place.
            ids: int64 `[batch, length]`.
            layer: the layer's place in `layers`.
            gates: `[batch, length, experts]` of any floating dtype, 0 where an expert is not active.
            largest_output: share of the output by the largest gate, `[batch, length]`; not read of tokens without one.
        """
        active = gates > 0
        taken = active.sum(dim=-1)
        places = self.sequences[domain] + torch.arange(len(ids))
        while places[-1] // self.part_sequences >= PARTS:
            self._join_parts()
        parts = places // self.part_sequences
        self.routed[domain, :, layer].index_add_(0, parts, active.sum(dim=1))
        self.histogram[domain, layer] += torch.bincount(taken.flatten(), minlength=active.shape[-1] + 1)
        self.common[domain, layer] += (active[:, 1:] & active[:, :-1]).sum()
        self.followers[domain, layer] += taken[:, 1:].sum()
        whole = active[:, : ids.shape[1] // WINDOW * WINDOW]
        self.union[domain, layer] += whole.unflatten(1, (-1, WINDOW)).any(dim=2).sum()
        self.by_token[layer].index_add_(0, ids.flatten(), active.flatten(0, 1).int())

        sizes, some = gates[active].double(), taken > 0
        classes = ((sizes.log2() - OCTAVES.start) * PER_OCTAVE).round().clamp(0, self.gates.shape[1] - 1)
        self.gates[layer] += torch.bincount(classes.long(), minlength=self.gates.shape[1])
        self.gate_sum[layer] += sizes.sum()
        self.largest_gate[layer] += (gates.amax(dim=-1) / gates.sum(dim=-1))[some].double().sum()
        self.largest_output[layer] += largest_output[some].double().sum()

    def _join_parts(self) -> None:
        """Join neighbouring parts, so that half of each data set's parts are empty."""
        joined = self.routed.unflatten(1, (-1, 2)).sum(dim=2)
        self.routed = torch.cat([joined, torch.zeros_like(joined)], dim=1)
        self.part_sequences *= 2
