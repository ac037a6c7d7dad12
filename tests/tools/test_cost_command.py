"""Test the command remoe cost: layouts, errors, hours, and settings that need GPUs."""

import re

import pytest

from tests.entry import shared_entry
from tests.scripts.launching import PLAIN
from tests.training_runs import REPOSITORY

MODEL = """
--num-layers 12 --hidden-size 768 --num-attention-heads 12 --ffn-hidden-size 3072 --group-query-attention
--num-query-groups 4 --seq-length 1024 --max-position-embeddings 1024 --normalization RMSNorm --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope --attention-dropout 0
--hidden-dropout 0 --make-vocab-size-divisible-by 1024 --micro-batch-size 1 --global-batch-size 512
--train-iters 100 --lr 5e-4 --bf16 --tokenizer-type NullTokenizer --vocab-size 50257
""".split()
EXPERTS = "--num-experts 8 --moe-router-topk 1 --moe-ffn-hidden-size 3072 --moe-token-dispatcher-type alltoall".split()
TENSOR_PARALLEL = ["--sequence-parallel", "--tensor-model-parallel-size"]


def cost(*arguments: str, code: int = 0) -> str:
    """Run remoe cost in a fork of a process with Megatron imported; return what it prints, errors included."""
    program = REPOSITORY / "tools" / "__main__.py"
    actual, output = shared_entry().run(["cost", *arguments], script=program, limit=120)
    assert actual == code and "Traceback" not in output, output
    return output


def figures(output: str, label: str) -> list[float]:
    """Return the numbers of the line that begins with the label."""
    line = next(line for line in output.splitlines() if line.strip().startswith(label))
    return [float(word.replace(",", "")) for word in line.split() if word.replace(",", "").replace(".", "").isdigit()]


@pytest.mark.parametrize(("gpus", "flags", "message"), [
    ("8", [*TENSOR_PARALLEL, "5"], "is not divisible by total_model_size"),
    ("4", ["--expert-model-parallel-size", "8"], "--expert-model-parallel-size 8: 4 GPUs are not divisible"),
    ("8", ["--context-parallel-size", "2", *PLAIN], "--context-parallel-size 2 cannot be used with"),
    ("8", ["--micro-batch-size", "7"], "micro_batch_size (7)"),
    ("8", ["--train-iters", "0"], "--train-iters is missing"),
    ("8", ["--hybrid-layer-pattern", "MEM*E"], "not for --hybrid-layer-pattern MEM*E"),
    ("8", ["--full-validation"], "--full-validation and --multiple-validation-sets"),
])  # fmt: skip
def test_layouts_that_cannot_work(gpus: str, flags: list[str], message: str) -> None:
    output = cost("--gpus", gpus, "--", *MODEL, *EXPERTS, "--moe-relu-routing", *flags, code=2)
    assert message in output and output.count("\n") <= 4


def test_hours_are_flops_over_a_share_of_the_peak() -> None:
    """A run's FLOPs over the GPUs' peak times the shares of --mfu. Wrong shares are refused."""
    flags = ["--", *MODEL, *EXPERTS, "--moe-relu-routing", "--train-iters", "60000"]
    for gpu, peak in (("h100", 989e12), ("a100", 312e12)):
        output = cost("--gpus", "8", "--gpu", gpu, "--mfu", "20", "40", *flags)
        [flops] = re.findall(r"([\d.e+]+) for the whole run", output)
        hours = [float(flops) / (8 * peak * share) / 3600 for share in (0.4, 0.2)]
        [times] = re.findall(r"GiB; ([\d.]+) hours to ([\d.]+) hours .*at 40 to 20 %", output)
        assert [*map(float, times)] == pytest.approx(hours, rel=0.02) and "remoe rehearse" in output
    for shares in (("0.3", "0.4"), ("40", "20"), ("20", "101")):
        assert "--mfu" in cost("--mfu", *shares, *flags, code=2)


def test_a_run_that_does_not_fit() -> None:
    flags = [*MODEL, *EXPERTS, "--moe-relu-routing", "--micro-batch-size", "256"]
    assert "DOES NOT FIT" in cost("--gpus", "1", "--gpu", "A100", "--", *flags)


def test_layers_of_multi_token_prediction_count() -> None:
    """MTP layers count, and GPTModel and HybridModel agree. MLA is refused."""
    common = [*MODEL, *EXPERTS, "--moe-relu-routing"]
    predicting, hybrid = (
        cost("--gpus", "8", "--", *common, *flags.split())
        for flags in ("--num-layers 2 --moe-layer-freq [0,1] --mtp-num-layers 1", "--hybrid-layer-pattern *-*E/*E")
    )
    for label in ("activations", "FLOPs"):
        assert figures(predicting, label) == figures(hybrid, label)
    engine = ["--mtp-num-layers", "1", "--transformer-impl", "transformer_engine"]
    cost("--gpus", "8", "--", *common, *engine, *TENSOR_PARALLEL, "2")
    mla = " ".join(common).replace("--group-query-attention --num-query-groups 4", "--multi-latent-attention").split()
    assert "--multi-latent-attention" in cost("--gpus", "8", "--", *mla, *engine, code=2)


@pytest.mark.parametrize(("flags", "optimizer"), [
    ("--bf16 --context-parallel-size 2 --fp8-format hybrid --fp8-param-gather", 12),
    ("--fp16 --fp4-format e2m1 --optimizer sgd", 8),
    ("--bf16 --fp8-format hybrid --optimizer muon --no-local-layer-fusion", 12),
])  # fmt: skip
def test_settings_for_gpus_that_a_cpu_could_not_train(flags: str, optimizer: int) -> None:
    model = [word for word in MODEL if word != "--bf16"]
    sharded = ["--moe-relu-routing", "--moe-relu-activation-limit", "0", "--use-distributed-optimizer"]
    output = cost("--gpus", "8", "--", *model, *EXPERTS, *sharded, *flags.split())
    total = figures(output, "total parameters")[0] / 2**30
    assert figures(output, "weights")[0] == pytest.approx(2 * total, abs=0.006) and "count as bf16" in output
    assert figures(output, "optimizer")[0] == pytest.approx(optimizer * total / 8, abs=0.006), "a part on each GPU"
