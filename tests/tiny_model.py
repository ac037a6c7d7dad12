"""Megatron's flags for the tiny model of the golden run, the parity runs and the tests."""

SIZES = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 128
--seq-length 64 --max-position-embeddings 64
""".split()
BYTES = "--tokenizer-type NullTokenizer --vocab-size 257".split()
MODEL = [
    *SIZES,
    *BYTES,
    *"""
    --group-query-attention --normalization RMSNorm --swiglu --position-embedding-type rope
    --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --init-method-std 0.02
    """.split(),
]
EXPERTS = "--num-experts 8 --moe-router-topk 1 --moe-ffn-hidden-size 128 --moe-token-dispatcher-type alltoall".split()
TOPK = [*EXPERTS, *"--moe-router-pre-softmax --moe-aux-loss-coeff 1e-2".split()]
RELU = [*EXPERTS, "--moe-relu-routing"]
# For short training runs without evaluation. Data loader processes would take a sixth of the time.
TRAINING = [
    *MODEL,
    *"--global-batch-size 8 --clip-grad 1.0 --seed 1234 --eval-interval 1000 --eval-iters 0 --num-workers 0".split(),
]
