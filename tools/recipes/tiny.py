"""Define the tiny models of the quickstart, of sweeps with --tiny and of remoe compare."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .models import Size, Training

# Warm up for longer than the dense start (about 100 steps): at the full rate, experts would die in it.
TRAINING = Training(1200, 32, 32, "4e-3", "4e-4", 0.95, 0.1, warmup=0.25)
NAMES = {"dense": "dense", "moe": "MoE (top-k)", "remoe": "ReMoE"}
BASE_SIZE, QUICKSTART = "182m", "2x64"


@dataclass(frozen=True)
class TinySize(Size):
    """Dimensions of a model, and the sequences in a batch."""

    batch: int = TRAINING.micro_batch


SIZE = TinySize(2, 64, 4, 128, query_groups=2, sequence=128, init_std=0.02, vocabulary_multiple=8)
# The keys are the sizes of the launch scripts that a tiny model replaces, or "layers x hidden size".
SIZES: Mapping[str, TinySize] = {
    BASE_SIZE: SIZE,
    "469m": replace(SIZE, layers=4, hidden=80, ffn=160),
    "978m": replace(SIZE, layers=4, hidden=128, ffn=256),
    # For subwords. Their output layer needs most of a step's time, so a step has half of the tokens.
    QUICKSTART: replace(SIZE, batch=16),
    "2x128": replace(SIZE, hidden=128, ffn=256, batch=16),
    "2x256": replace(SIZE, hidden=256, ffn=512, batch=16),
    "4x256": replace(SIZE, layers=4, hidden=256, ffn=512, batch=16),
}
SEED = 1234


def common_flags(size: TinySize, training: Training, seed: int) -> list[str]:
    """Return the Megatron flags that all routings share."""
    iterations = training.iterations
    log_interval, save_interval = max(1, min(20, iterations // 20)), max(1, iterations // 10)
    training = replace(training, micro_batch=size.batch, global_batch=size.batch)
    rest = f"""
        --seed {seed} --num-workers 0 --no-create-attention-mask-in-dataloader
        --eval-interval {iterations + 1}
        --log-interval {log_interval} --log-timers-to-tensorboard
        --tensorboard-log-interval {max(1, log_interval // 4)}
        --save-interval {save_interval} --save-retain-interval {100 * save_interval} --exit-signal-handler
    """
    return ["--cpu", "--num-layers", str(size.layers), *size.flags(), *training.flags(), *rest.split()]
