"""Runs real trainings of a tiny model with the project's entry, and reads their logs."""

import os
import subprocess
import sys
from pathlib import Path

from megatron.remoe.log_reader import read_log

REPOSITORY = Path(__file__).resolve().parent.parent

TINY = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--ffn-hidden-size 128 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
--normalization RMSNorm --swiglu --position-embedding-type rope --untie-embeddings-and-output-weights
--disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
--lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --clip-grad 1.0 --seed 1234
--tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 192 --split 90,10,0
--train-iters 8 --log-interval 1 --eval-interval 1000 --eval-iters 0
""".split()
EXPERTS = "--num-experts 8 --moe-router-topk 1 --moe-ffn-hidden-size 128 --moe-token-dispatcher-type alltoall".split()
TOPK = [*EXPERTS, *"--moe-router-pre-softmax --moe-aux-loss-coeff 1e-2".split()]
RELU = [*EXPERTS, "--moe-relu-routing"]

# Timings, and what another rank prints into the line.
VOLATILE = ("elapsed time per iteration (ms)", "allocated", "max allocated", "reserved", "max reserved")


def start(arguments: list[str], processes: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Start the entry, under torchrun for more than one process."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*launcher, str(REPOSITORY / "pretrain_gpt.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def run(arguments: list[str], processes: int = 1, expect: int | None = 0, **environment: str) -> str:
    """Run the entry to its end and return what it printed; assert its exit code unless `expect` is None."""
    process = start(arguments, processes, **environment)
    output, _ = process.communicate(timeout=240)
    assert expect is None or process.returncode == expect, output[-4000:]
    return output


def records(output: str) -> dict[int, dict[str, str]]:
    """Iteration → field → text of the value, from Megatron's log lines; without timings."""
    return {
        iteration: {name: value for name, value in fields.items() if name not in VOLATILE}
        for iteration, fields in read_log(output).items()
    }


def series(output: str, field: str) -> list[float]:
    """The values of a field by iteration."""
    return [float(record[field]) for _, record in sorted(records(output).items())]
