"""Define the tiny models of the quickstart, of sweeps with --tiny and of tools/compare."""

from dataclasses import dataclass, replace

from .models import TINY, TINY_TRAINING, Routing, Size

NAMES = {"dense": "dense", "moe": "MoE (top-k)", "remoe": "ReMoE"}


@dataclass(frozen=True)
class TinySize(Size):
    """Dimensions of a model, with its experts and the sequences in a batch; tokens are bytes."""

    experts: int = 8
    topk: int = 1
    batch: int = TINY_TRAINING.micro_batch
    vocabulary: int = 257  # the bytes and the end of a document

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens in one optimizer step."""
        return self.sequence * self.batch


SIZE = TinySize(**vars(TINY))
ITERATIONS = TINY_TRAINING.iterations
SEED = 1234
RELATIVE_COST = {"dense": 1.0, "moe": 1.3, "remoe": 1.3}  # time of an iteration, for the time left


def common_flags(size: TinySize, iterations: int, seed: int) -> list[str]:
    """Return the Megatron flags that all routings share."""
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


def model_flags(model: str, size: TinySize) -> list[str]:
    """Return the flags of a routing; none for a dense model."""
    flags = Routing(model, size.experts, topk=size.topk).flags(size.ffn)
    return [*flags, "--moe-per-layer-logging"] if flags else []
