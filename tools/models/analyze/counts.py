"""Count how a model routes its tokens."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from megatron.remoe.hf import RemoeForCausalLM
from megatron.remoe.hf.modeling_remoe import RemoeSparseMoeBlock

from ...console.display import Display
from ..expert_counts import expert_blocks
from ..text import Text
from .arguments import WINDOW

PARTS = 1024  # most parts of a data set
OCTAVES, PER_OCTAVE = range(-24, 8), 32  # classes of gates by size
TOKENS_PER_FORWARD = 4096


class Counts:
    """Sums over tokens, for D data sets, L layers with experts, E experts, V tokens of the vocabulary.

    Args:
        layers: numbers of the layers, from 1. `[L]`
        sequences: how many of each data set will be added. `[D]`
        length: tokens of a sequence.
        experts: E.
        vocabulary: V.
    """

    def __init__(
        self, layers: Sequence[int], sequences: Sequence[int], length: int, experts: int, vocabulary: int
    ) -> None:
        zeros = partial(torch.zeros, dtype=torch.int64)
        number, domains = len(layers), len(sequences)
        self.layers, self.sequences = [*layers], torch.tensor(sequences)
        self.tokens, self.windows = self.sequences * length, self.sequences * (length // WINDOW)
        # A part is a number of consecutive sequences, the same in all data sets, so that parts can be shuffled.
        self.part_sequences = 1
        while (max(sequences) - 1) // self.part_sequences >= PARTS:
            self.part_sequences *= 2
        self.routed = zeros(domains, PARTS, number, experts)  # pairs of a token and an active expert
        self.histogram = zeros(domains, number, experts + 1)  # tokens with 0, 1, 2, ... experts
        self.common = zeros(domains, number)  # pairs whose expert the previous token has too
        self.followers = zeros(domains, number)  # pairs of tokens that have a previous one
        self.union = zeros(domains, number)  # different experts of a window, over all windows
        self.gates = zeros(number, len(OCTAVES) * PER_OCTAVE)  # active gates by size
        self.gate_sum = zeros(number, dtype=torch.float64)
        self.largest_gate = zeros(number, dtype=torch.float64)  # share of the token's gates, over tokens with experts
        self.largest_output = zeros(number, dtype=torch.float64)  # the same for the output
        self.by_token = zeros(number, vocabulary, experts, dtype=torch.int32)
        self.occurrences = zeros(vocabulary)
        # By the number of experts, of each layer and, in the last row, of all layers together: tokens, their loss when
        # they were predicted, and the loss of the token after them. Of those that have both.
        self.by_experts = zeros(3, number + 1, number * experts + 1, dtype=torch.float64)
        self.loss_squares = zeros(2, dtype=torch.float64)  # sums of both losses' squares

    def add(
        self, domain: int, start: int, ids: torch.Tensor, place: int, gates: torch.Tensor, largest_output: torch.Tensor
    ) -> None:
        """Count the routing of some sequences in one layer.

        Args:
            domain: the data set's place.
            start: the first sequence's place in the data set.
            ids: int64 `[batch, length]`.
            place: the layer's place among those with experts.
            gates: `[batch, length, experts]` of any floating dtype, 0 where an expert is not active.
            largest_output: the largest gate's share of the output, `[batch, length]`; not read without an expert.
        """
        active = gates > 0
        taken = active.sum(dim=-1)
        parts = (start + torch.arange(len(ids))) // self.part_sequences
        self.routed[domain, :, place].index_add_(0, parts, active.sum(dim=1))
        self.histogram[domain, place] += torch.bincount(taken.flatten(), minlength=active.shape[-1] + 1)
        self.common[domain, place] += (active[:, 1:] & active[:, :-1]).sum()
        self.followers[domain, place] += taken[:, 1:].sum()
        whole = active[:, : ids.shape[1] // WINDOW * WINDOW]
        self.union[domain, place] += whole.unflatten(1, (-1, WINDOW)).any(dim=2).sum()
        self.by_token[place].index_add_(0, ids.flatten(), active.flatten(0, 1).int())
        if place == 0:
            self.occurrences += torch.bincount(ids.flatten(), minlength=len(self.occurrences))

        sizes, some = gates[active].double(), taken > 0
        classes = ((sizes.log2() - OCTAVES.start) * PER_OCTAVE).round().clamp(0, self.gates.shape[1] - 1)
        self.gates[place] += torch.bincount(classes.long(), minlength=self.gates.shape[1])
        self.gate_sum[place] += sizes.sum()
        self.largest_gate[place] += (gates.amax(dim=-1) / gates.sum(dim=-1))[some].double().sum()
        self.largest_output[place] += largest_output[some].double().sum()

    def add_losses(self, numbers: torch.Tensor, losses: torch.Tensor) -> None:
        """Count the losses of some sequences.

        Args:
            numbers: experts of each token, int64 `[L, batch, length]`.
            losses: in nats, of the tokens after the first, float `[batch, length - 1]`.
        """
        losses = losses.double()
        both = torch.stack([losses[:, :-1].flatten(), losses[:, 1:].flatten()])
        self.loss_squares += both.square().sum(dim=1)
        for row, number in enumerate([*numbers, numbers.sum(dim=0)]):
            number = number[:, 1:-1].flatten()
            self.by_experts[0, row] += torch.bincount(number, minlength=self.by_experts.shape[-1])
            self.by_experts[1:, row].index_add_(1, number, both)


@contextmanager
def observe_routing(model: RemoeForCausalLM) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Yield a list to which each forward pass appends the routing of each layer with experts.

    An entry has two tensors on the CPU: gates `[batch, length, experts]` in the router's dtype, 0 for inactive experts;
    and the largest gate's share of the output, float32 `[batch, length]`: |a| / (|a| + |b|), where a is the output of
    that expert and b the sum of the others, without shared experts; NaN if both are 0.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(block: RemoeSparseMoeBlock, given: tuple, output: torch.Tensor) -> None:
        hidden_states, *token_ids = given
        tokens, shape = hidden_states.flatten(0, 1), hidden_states.shape[:2]
        logits, top, experts = block.gate(tokens, *token_ids)
        gates = torch.zeros_like(logits).scatter(-1, experts, top)
        routed = output.flatten(0, 1)
        if block.shared_expert is not None:
            routed = routed - block.shared_output(tokens)
        gate, expert = gates.max(dim=-1, keepdim=True)
        largest = block.experts(tokens, expert, gate)
        size, rest = largest.float().norm(dim=-1), (routed - largest).float().norm(dim=-1)
        seen.append((gates.unflatten(0, shape).cpu(), (size / (size + rest)).unflatten(0, shape).cpu()))

    with ExitStack() as hooks:
        for block in expert_blocks(model).values():
            hooks.enter_context(block.register_forward_hook(look))
        yield seen


@torch.inference_mode()
def count(
    model: RemoeForCausalLM, texts: Sequence[Text], layers: list[int], most: int | None, display: Display
) -> Counts:
    """Run the model over at most `most` sequences of each domain's text, and return its counts."""
    numbers, length = [min(len(text), most or len(text)) for text in texts], texts[0].length
    counts = Counts(layers, numbers, length, model.config.num_experts, model.config.vocab_size)
    size = max(1, TOKENS_PER_FORWARD // length)
    for domain, (text, number) in enumerate(zip(texts, numbers, strict=True)):
        with display.step(Path(text.prefix).name, number), observe_routing(model) as seen:
            for start in range(0, number, size):
                ids = text.read(start, min(number, start + size))
                on_device = ids.to(model.device)
                logits = model(on_device, use_cache=False).logits[:, :-1]
                losses = cross_entropy(logits.flatten(0, 1).float(), on_device[:, 1:].flatten(), reduction="none")
                for place, (gates, largest_output) in enumerate(seen):
                    counts.add(domain, start, ids, place, gates, largest_output)
                taken = torch.stack([(gates > 0).sum(dim=-1) for gates, _ in seen])
                counts.add_losses(taken, losses.view(len(ids), -1).cpu())
                seen.clear()
                display.advance(len(ids))
    return counts
