"""Measure models of Megatron and of transformers: logits, the loss of a text, experts per token."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from megatron.remoe.hf import RemoeForCausalLM
from megatron.remoe.hf.modeling_remoe import RemoeSparseMoeBlock

from ..console.errors import ConversionError

TOKENS_PER_FORWARD = 4096
MAX_LOGIT_DIFFERENCE = 1e-4  # largest accepted difference of logits, as a share of the largest logit


def check_finite(source: str, tensors: Mapping[str, object]) -> None:
    """Check a model's weights; `source` is named in the error.

    Raises:
        ConversionError: a tensor holds NaN or infinity.
    """
    for name, value in tensors.items():
        if torch.is_tensor(value) and not torch.isfinite(value).all():
            raise ConversionError(f"{source}: {name} holds values that are not finite. Choose an earlier checkpoint.")


def compute_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return float32 logits `[batch, length, vocabulary]` of a model of Megatron or of transformers.

    Args:
        model: in evaluation mode.
        ids: int64 `[batch, length]`, on the model's device.
    """
    if isinstance(model, PreTrainedModel):
        logits = model(ids, use_cache=False).logits
    else:
        logits = model(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids), None)
    return logits.float()


@torch.no_grad()
def compute_all_logits(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits for each batch of `split_batches`, as `compute_logits` does for one."""
    return [compute_logits(model, batch) for batch in split_batches(ids)]


def split_batches(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split sequences `[sequences, length]` into batches of at most `TOKENS_PER_FORWARD` tokens, or of one sequence."""
    return ids.split(max(1, TOKENS_PER_FORWARD // ids.shape[1]))


class TextLoss(NamedTuple):
    """The loss of a text.

    Attributes:
        loss: mean cross entropy in nats per token.
        loss_per_byte: the same in nats per byte of text; None without a tokenizer.
        tokens: number of predicted tokens.
        repeats_loss: mean cross entropy of those that `find_repeats` finds; None if there are none.
        repeats: their number.
    """

    loss: float
    loss_per_byte: float | None
    tokens: int
    repeats_loss: float | None
    repeats: int


def find_repeats(ids: torch.Tensor) -> torch.Tensor:
    """Find the tokens that complete a pair of neighbors seen before in the sequence, so that a model can copy them.

    Args:
        ids: int64 `[sequences, length + 1]`.

    Returns:
        bool `[sequences, length]`, for the tokens after the first.
    """
    pairs, places = ((ids[:, :-1] << 32) + ids[:, 1:]).sort(dim=1, stable=True)
    return torch.zeros_like(pairs, dtype=torch.bool).scatter_(1, places[:, 1:], pairs.diff(dim=1) == 0)


@torch.no_grad()
def measure_loss(
    model: Any,
    batches: Iterable[torch.Tensor],
    advance: Callable[[int], None] = lambda sequences: None,
    lengths: torch.Tensor | None = None,
) -> TextLoss:
    """Return the loss of a text.

    Args:
        model: of Megatron or of transformers, in evaluation mode.
        batches: int64 `[batch, length + 1]` each.
        advance: called with the number of sequences of each batch, from `show_step`.
        lengths: int64 `[vocabulary]`, the bytes of each token.
    """
    sums, device, size = torch.zeros(4, dtype=torch.float64), next(model.parameters()).device, 0
    for batch in batches:
        ids = batch.to(device)
        logits, labels = compute_logits(model, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
        losses, repeats = cross_entropy(logits, labels, reduction="none").double(), find_repeats(ids).flatten()
        copied = losses[repeats]
        sums += torch.tensor([losses.sum(), len(losses), copied.sum(), len(copied)], dtype=torch.float64)
        if lengths is not None:
            size += int(lengths[batch[:, 1:]].sum())
        advance(len(batch))
    loss, tokens, repeats_loss, number = sums.tolist()
    repeats_mean, per_byte = (repeats_loss / number if number else None), (loss / size if size else None)
    return TextLoss(loss / tokens, per_byte, int(tokens), repeats_mean, int(number))


@torch.no_grad()
def compare_models(model: Any, expected: list[torch.Tensor], ids: torch.Tensor) -> str:
    """Return the largest difference between two models' logits as text.

    Args:
        model: of Megatron or of transformers, on the CPU in float32, in evaluation mode.
        expected: the other model's logits, from `compute_all_logits`.
        ids: random tokens, int64 `[sequences, length]`.

    Raises:
        ConversionError: the difference is above `MAX_LOGIT_DIFFERENCE`, so it is not just rounding.
    """
    difference = largest = torch.zeros(())
    for batch, logits in zip(split_batches(ids), expected, strict=True):
        differences = (compute_logits(model, batch) - logits).abs()
        difference = torch.maximum(difference, differences.max())  # keeps NaN, as `max` does not
        largest = torch.maximum(largest, logits.abs().max())
    share = float(difference / largest)
    text = f"largest difference of logits {share:.1e} of the largest, on {ids.numel():,} random tokens"
    if not share <= MAX_LOGIT_DIFFERENCE:
        raise ConversionError(
            f"{text}, above {MAX_LOGIT_DIFFERENCE:.0e}: nothing was written. Please report this error.", "REMOE-E514"
        )
    return text


def find_blocks(model: RemoeForCausalLM) -> dict[int, RemoeSparseMoeBlock]:
    """Return layer number, from 1 → MoE block, for each layer with experts."""
    layers = enumerate(model.model.layers, start=1)
    return {number: layer.mlp for number, layer in layers if isinstance(layer.mlp, RemoeSparseMoeBlock)}


@contextmanager
def watch_routers(model: Any, see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call `see` for each layer with experts in every forward pass inside the `with` block.

    Args:
        model: of Megatron, or a RemoeForCausalLM.
        see: gets the layer's number, from 1, and its active pairs, bool `[tokens, experts]`, padding included.
    """

    def look(number: int, _router: object, _inputs: object, routed: tuple[torch.Tensor, ...]) -> None:
        if len(routed) == 2:  # Megatron's gates and routing map
            see(number, routed[1])
        else:  # logits, gates and experts
            see(number, torch.zeros_like(routed[0], dtype=torch.bool).scatter(-1, routed[2], routed[1] > 0))

    if isinstance(model, RemoeForCausalLM):
        routers = {number: block.gate for number, block in find_blocks(model).items()}
    else:
        layers = enumerate(model.decoder.layers, start=1)
        routers = {number: layer.mlp.router for number, layer in layers if hasattr(layer.mlp, "router")}
    with ExitStack() as hooks:
        for number, router in routers.items():
            hooks.enter_context(router.register_forward_hook(partial(look, number)))
        yield


@contextmanager
def count_experts(model: Any) -> Iterator[dict[int, torch.Tensor]]:
    """Count the active experts of every token in the forward passes inside the `with` block.

    Yields:
        Number of a layer with experts, from 1 → int64 `[E + 1]`, the number of tokens with 0, 1, 2, ... experts.
    """
    histograms: dict[int, torch.Tensor] = {}

    def count(number: int, active: torch.Tensor) -> None:
        new = torch.bincount(active.sum(dim=-1), minlength=active.shape[-1] + 1).cpu()
        histograms[number] = histograms.get(number, 0) + new

    with watch_routers(model, count):
        yield histograms


def mean_experts(histograms: Iterable[torch.Tensor]) -> float:
    """Return the mean number of experts per token and layer, from histograms of `count_experts`."""
    total = torch.stack([*histograms]).sum(dim=0)
    return float((total * torch.arange(len(total))).sum() / total.sum())


def summarize_experts(histogram: torch.Tensor) -> dict[str, Any]:
    """Summarize a layer's experts per token.

    Args:
        histogram: int64 `[E + 1]`, from `count_experts`.

    Returns:
        "mean", "percentile_99" and "largest" number of experts, and the number of "tokens".
    """
    tokens = int(histogram.sum())
    return {
        "mean": mean_experts([histogram]),
        "percentile_99": int((histogram.cumsum(0) / tokens >= 0.99).nonzero()[0]),
        "largest": int(histogram.nonzero()[-1]),
        "tokens": tokens,
    }
