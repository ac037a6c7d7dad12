"""The three models: what they share, the few flags in which they differ, and how many parameters they have."""

from dataclasses import dataclass
from pathlib import Path

NAMES = {"dense": "dense", "moe": "MoE (top-k)", "remoe": "ReMoE"}


@dataclass(frozen=True)
class Size:
    """Sizes of the models and of a training step; all three models have them."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    query_groups: int = 2
    ffn: int = 128  # of the dense model, and of every expert
    experts: int = 8
    topk: int = 1
    sequence: int = 128  # tokens, which are bytes
    batch: int = 32  # sequences
    vocabulary: int = 257  # the bytes and the end of a document
    vocabulary_multiple: int = 8  # Megatron pads the vocabulary to a multiple of this

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens in one optimizer step."""
        return self.sequence * self.batch


SIZE = Size()
ITERATIONS = 1200
SEED = 1234

# For the time left alone: an iteration's time against the dense model's, held-out sequences that take as long as one.
RELATIVE_COST = {"dense": 1.0, "moe": 1.3, "remoe": 1.3}
EVALUATED_PER_ITERATION = 8


def common_flags(size: Size, iterations: int, seed: int) -> list[str]:
    """Megatron's flags that all three models share."""
    log_interval, save_interval = max(1, min(20, iterations // 20)), max(1, iterations // 10)
    return f"""
        --cpu
        --num-layers {size.layers} --hidden-size {size.hidden} --ffn-hidden-size {size.ffn}
        --num-attention-heads {size.heads} --group-query-attention --num-query-groups {size.query_groups}
        --seq-length {size.sequence} --max-position-embeddings {size.sequence}
        --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
        --position-embedding-type rope --rotary-base 1000000
        --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02 --no-create-attention-mask-in-dataloader
        --micro-batch-size {size.batch} --global-batch-size {size.batch} --train-iters {iterations} --seed {seed}
        --lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --lr-warmup-fraction 0.01
        --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
        --make-vocab-size-divisible-by {size.vocabulary_multiple} --num-workers 0
        --eval-interval {iterations + 1} --multiple-validation-sets --full-validation
        --log-interval {log_interval} --log-timers-to-tensorboard
        --tensorboard-log-interval {max(1, log_interval // 4)}
        --save-interval {save_interval} --save-retain-interval {100 * save_interval} --exit-signal-handler
    """.split()


def model_flags(model: str, size: Size) -> list[str]:
    """The flags in which the models differ: none for the dense one."""
    experts = f"--num-experts {size.experts} --moe-router-topk {size.topk} --moe-ffn-hidden-size {size.ffn}"
    experts += " --moe-token-dispatcher-type alltoall --moe-per-layer-logging"
    balancing = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"
    return {
        "dense": "",
        "moe": f"{experts} --moe-router-pre-softmax {balancing}",
        "remoe": f"{experts} --moe-relu-routing",
    }[model].split()


def data_flags(data: Path, train_tokens: dict[str, int]) -> list[str]:
    """Where the text is: domains in training in proportion to their size, held-out text domain by domain.

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
    """Where a training leaves its checkpoints and figures, and where it goes on from."""
    checkpoints = str(folder / "checkpoints")
    return ["--save", checkpoints, "--load", checkpoints, "--tensorboard-dir", str(folder / "tensorboard")]


def data_prefix(data: Path, part: str, domain: str) -> str:
    """Prefix of a preprocessed .bin/.idx pair, as the preprocessing tool names it."""
    return str(data / f"{part}_{domain}_text_document")


def parameters(model: str, size: Size) -> tuple[int, int]:
    """Active and total parameters: a token passes through `topk` experts of every layer, on average in ReMoE."""
    padded = -(-size.vocabulary // size.vocabulary_multiple) * size.vocabulary_multiple
    head = size.hidden // size.heads
    attention = size.hidden * (size.hidden + 2 * size.query_groups * head) + size.hidden * size.hidden
    norms = 2 * size.hidden
    expert = 3 * size.hidden * size.ffn  # SwiGLU: gate, up and down projection
    outside = 2 * padded * size.hidden + size.hidden  # embedding, output layer, last norm
    if model == "dense":
        active = outside + size.layers * (attention + norms + expert)
        return active, active
    shared = outside + size.layers * (attention + norms + size.hidden * size.experts)  # with the router
    return shared + size.layers * size.topk * expert, shared + size.layers * size.experts * expert
