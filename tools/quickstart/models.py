"""Define the quickstart's three models and their flags."""

from dataclasses import dataclass, replace
from pathlib import Path

from ..recipes.models import TINY, TINY_TRAINING, Routing
from ..recipes.models import Size as Dimensions

NAMES = {"dense": "dense", "moe": "MoE (top-k)", "remoe": "ReMoE"}


@dataclass(frozen=True)
class Size(Dimensions):
    """Dimensions of the models, with their experts, and sequences in a batch; tokens are bytes."""

    experts: int = 8
    topk: int = 1
    batch: int = TINY_TRAINING.micro_batch
    vocabulary: int = 257  # the bytes and the end of a document

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens in one optimizer step."""
        return self.sequence * self.batch


SIZE = Size(**vars(TINY))
ITERATIONS = TINY_TRAINING.iterations
SEED = 1234
RELATIVE_COST = {"dense": 1.0, "moe": 1.3, "remoe": 1.3}  # time of an iteration, for the time left


def common_flags(size: Size, iterations: int, seed: int) -> list[str]:
    """Return the Megatron flags of all three models."""
    log_interval, save_interval = max(1, min(20, iterations // 20)), max(1, iterations // 10)
    training = replace(TINY_TRAINING, iterations=iterations, micro_batch=size.batch, global_batch=size.batch)
    rest = f"""
        --seed {seed} --num-workers 0 --no-create-attention-mask-in-dataloader
        --eval-interval {iterations + 1} --multiple-validation-sets --full-validation
        --log-interval {log_interval} --log-timers-to-tensorboard
        --tensorboard-log-interval {max(1, log_interval // 4)}
        --save-interval {save_interval} --save-retain-interval {100 * save_interval} --exit-signal-handler
    """
    return ["--cpu", *size.layer_flags("dense"), *size.flags(), *training.flags(), *rest.split()]


def model_flags(model: str, size: Size) -> list[str]:
    """Return the flags of one model's routing; none for the dense one."""
    flags = Routing(model, size.experts, topk=size.topk).flags(size.ffn)
    return [*flags, *["--moe-per-layer-logging"] * bool(flags)]


def data_flags(data: Path, train_tokens: dict[str, int]) -> list[str]:
    """Return the flags for the text: training on all domains in proportion to their size, evaluation on each domain.

    Args:
        data: folder of the preprocessed text and its vocabulary.
        train_tokens: domain → number of training tokens.
    """
    weighted = [word for domain, n in train_tokens.items() for word in (str(n), data_prefix(data, "train", domain))]
    held_out = [data_prefix(data, "heldout", domain) for domain in train_tokens]
    return [
        *("--tokenizer-type", "GPT2BPETokenizer"),
        *("--vocab-file", str(data / "vocab.json"), "--merge-file", str(data / "merges.txt")),
        *("--train-data-path", *weighted),
        *("--valid-data-path", *held_out),
        *("--validation-set-names", *train_tokens),
        *("--data-cache-path", str(data / "cache")),
    ]


def output_flags(folder: Path) -> list[str]:
    """Return the flags for a training's checkpoints and figures; it resumes from them."""
    checkpoints = str(folder / "checkpoints")
    return ["--save", checkpoints, "--load", checkpoints, "--tensorboard-dir", str(folder / "tensorboard")]


def data_prefix(data: Path, part: str, domain: str) -> str:
    """Return the prefix of a .bin/.idx pair, as the preprocessing tool names it."""
    return str(data / f"{part}_{domain}_text_document")
