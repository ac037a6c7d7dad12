"""The runs of the authors' code whose checkpoints, logits and losses are in this folder, one archive per kind.

To make the archives again, with the program in commit 190c63a6 (the fork needs PyTorch 2.5):

    git clone https://github.com/thu-ml/ReMoE fork
    python3.11 -m venv venv
    venv/bin/pip install torch==2.5.1 numpy==1.26.4 einops packaging setuptools psutil pyyaml regex six
    venv/bin/python tests/fork/oracle.py fork
"""

from pathlib import Path

import numpy

from tests.data_sets import write_tokens

SAVED, LAST = 8, 18  # iterations
MODEL = """
--use-mcore-models --num-layers 2 --hidden-size 16 --num-attention-heads 2 --num-query-groups 1 --seq-length 16
--ffn-hidden-size 16 --max-position-embeddings 16 --tokenizer-type NullTokenizer --vocab-size 63
--make-vocab-size-divisible-by 8 --group-query-attention --normalization RMSNorm --swiglu --position-embedding-type rope
--no-position-embedding --rotary-base 1000000 --untie-embeddings-and-output-weights --disable-bias-linear
--attention-dropout 0 --hidden-dropout 0 --init-method-std 0.1 --no-masked-softmax-fusion
""".split()
TRAINING = f"""
--micro-batch-size 4 --global-batch-size 8 --clip-grad 1.0 --eval-interval 1000 --eval-iters 0 --lr 4e-3 --min-lr 4e-4
--lr-decay-style cosine --lr-warmup-fraction 0.01 --log-interval 1 --split 90,10,0 --train-iters {LAST}
--save-interval {SAVED}
""".split()
TOPK = """
--num-experts 4 --moe-router-topk 1 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
--moe-token-dispatcher-type alltoall --moe-router-pre-softmax
""".split()
RELU = [*TOPK, *"--moe-relu-routing --moe-relu-l1-reg-coeff-init 1e-4".split()]
# As in the fork's scripts, on a machine with Transformer Engine.
ENGINE = "--transformer-impl transformer_engine --use-distributed-optimizer --sequence-parallel".split()
LOCAL = "--transformer-impl local".split()
KINDS = {
    "dense": LOCAL,
    "topk": [*TOPK, *ENGINE, *"--moe-grouped-gemm --overlap-grad-reduce --overlap-param-gather --bf16".split()],
    "remoe": [*RELU, *ENGINE, *"--moe-grouped-gemm --moe-granularity 2 --moe-layer-recompute --bf16".split()],
}
KEPT = tuple(KINDS)


def write_data(prefix: Path) -> None:
    """Write 40 documents of 200 tokens. Each token is the previous one plus 7, 14 or 21, modulo 63."""
    steps = numpy.random.RandomState(1).randint(1, 4, size=(40, 200))
    write_tokens(prefix, (steps.cumsum(axis=1) * 7 % 63).astype(numpy.uint16).flatten(), [200] * 40)
