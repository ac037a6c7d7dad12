"""Define sizes, routings and training settings, and their Megatron flags."""

from dataclasses import dataclass

ROUTINGS = ("dense", "moe", "remoe")


@dataclass(frozen=True)
class Size:
    """Dimensions of a model.

    Attributes:
        ffn: width of a dense layer's MLP, and of an expert before granularity divides it.
        query_groups: heads of keys and values.
        sequence: tokens of a sequence.
        init_std: standard deviation of the initial weights.
        vocabulary_multiple: Megatron pads the vocabulary to a multiple of it.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    query_groups: int = 4
    sequence: int = 1024
    init_std: float = 0.01
    vocabulary_multiple: int = 1024

    def flags(self) -> list[str]:
        """Return Megatron's flags, except for the layers."""
        return f"""
            --hidden-size {self.hidden} --num-attention-heads {self.heads} --ffn-hidden-size {self.ffn}
            --group-query-attention --num-query-groups {self.query_groups}
            --seq-length {self.sequence} --max-position-embeddings {self.sequence}
            --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
            --position-embedding-type rope --rotary-base 1000000 --attention-dropout 0 --hidden-dropout 0
            --init-method-std {self.init_std} --make-vocab-size-divisible-by {self.vocabulary_multiple}
        """.split()

    def hybrid_flags(self, routing: str, stages: int) -> list[str]:
        """Return the flags for the layers of a HybridModel cut into pipeline `stages`.

        Its pattern has a letter for each sublayer: * attention, - MLP, E experts; | ends a stage.
        """
        layer = "*-" if routing == "dense" else "*E"
        return ["--hybrid-layer-pattern", "|".join([layer * (self.layers // stages)] * stages)]


PAPER = {
    "182m": Size(layers=12, hidden=768, heads=12, ffn=3072),
    "469m": Size(layers=24, hidden=1024, heads=16, ffn=4096),
    "978m": Size(layers=24, hidden=1536, heads=16, ffn=6144),
}
SAVE_INTERVALS = {"182m": 5000, "469m": 5000, "978m": 2500}  # iterations; of the authors' fork


@dataclass(frozen=True)
class Routing:
    """A routing and its experts.

    Attributes:
        kind: one of `ROUTINGS`.
        experts: number of experts of a layer, before each is split into `granularity` smaller ones.
        topk: active experts of a token, before granularity.
    """

    kind: str
    experts: int = 8
    granularity: int = 1
    topk: int = 1

    def flags(self, ffn: int) -> list[str]:
        """Return Megatron's flags for experts of width `ffn`; none for a dense model."""
        experts = f"""
            --num-experts {self.experts} --moe-router-topk {self.topk} --moe-granularity {self.granularity}
            --moe-ffn-hidden-size {ffn} --moe-token-dispatcher-type alltoall
        """
        balancing = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"
        return {
            "dense": "",
            "moe": f"{experts} --moe-router-pre-softmax {balancing}",
            "remoe": f"{experts} --moe-relu-routing",
        }[self.kind].split()


@dataclass(frozen=True)
class Training:
    """Batches and optimizer. Learning rates are text, as flags have them.

    Attributes:
        warmup: share of the iterations in which the learning rate rises.
        warmup_steps: number of these iterations; None to use the share.
        decay_steps: number of steps at the end in which the learning rate falls linearly, after a constant part; None
            for a cosine.
    """

    iterations: int = 60000
    micro_batch: int = 16
    global_batch: int = 512
    lr: str = "5e-4"
    min_lr: str = "5e-5"
    beta2: float = 0.999
    weight_decay: float = 0.01
    warmup: float = 0.01
    warmup_steps: int | None = None
    decay_steps: int | None = None

    def flags(self) -> list[str]:
        """Return Megatron's flags."""
        warmup = f"fraction {self.warmup}" if self.warmup_steps is None else f"iters {self.warmup_steps}"
        linear = f"WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters {self.decay_steps}"
        return f"""
            --micro-batch-size {self.micro_batch} --global-batch-size {self.global_batch}
            --train-iters {self.iterations} --lr {self.lr} --min-lr {self.min_lr}
            --lr-decay-style {"cosine" if self.decay_steps is None else linear}
            --lr-warmup-{warmup} --adam-beta1 0.9 --adam-beta2 {self.beta2}
            --weight-decay {self.weight_decay} --clip-grad 1.0
        """.split()
