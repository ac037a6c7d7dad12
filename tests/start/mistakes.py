"""Mistakes in the entry's flags and environment, and the messages that users must get."""

from dataclasses import dataclass
from pathlib import Path

from tests.tiny_model import RELU
from tests.training_runs import TINY, without


@dataclass(frozen=True)
class Case:
    """A user's arguments, and parts of the last error, separated by bars: its code, flags, files and values.

    In the arguments, "@name" is a file of the user.
    """

    arguments: list[str]
    message: str
    code: int = 2
    environment: dict[str, str] | None = None


def fill(arguments: list[str], folder: Path) -> list[str]:
    """Replace "@name" by the path of a file in the user's folder."""
    return [word.replace("@", f"{folder}/") for word in arguments]


def plain(flags: str = "", prefix: str = "text") -> list[str]:
    """Return the arguments of a training run on a data set."""
    return [*TINY, "--data-path", f"@{prefix}", *flags.split()]


def on(prefix: str, flags: str = "") -> list[str]:
    """Return the arguments of a ReMoE run on a data set."""
    return plain(f"{' '.join(RELU)} {flags}", prefix)


def lacking(names: str, flags: str = "") -> list[str]:
    """Return the arguments of a ReMoE run without these flags and their values."""
    return without(on("text", flags), *names.split())


def resumed(flags: str = "", run: str = "remoe") -> list[str]:
    """Return the arguments that resume a ReMoE run of this user, with more flags."""
    return on("text", f"--save-interval 2 --train-iters 2 --load @{run} --save @{run} {flags}")


MAKE = "remoe preprocess"
HYBRID = "--hybrid-layer-pattern *E*E"
WHOLE = "--full-validation --multiple-validation-sets --train-data-path @text --valid-data-path @text"
ENTRY = {
    # data; tests/files has all kinds of damage
    "no data": Case(lacking("--data-path"), "E301|--data-path|--mock-data"),
    "missing data": Case(on("nowhere"), f"E301|--data-path|nowhere.idx|nowhere.bin|{MAKE}"),
    "truncated .bin": Case(on("short_bin"), f"E302|short_bin.bin|1,000 bytes|{MAKE}"),
    "less than a sequence": Case(on("few", "--split 100,0,0"), "E304|4 tokens|--seq-length 64"),
    "no document for validation": Case(on("one", "--eval-iters 1"), "E304|1 document(s)|validation|--split 90,10,0"),
    "a blend too short": Case(on("text", "--data-path @text @text --eval-iters 9999"), "E303|validation|weights"),
    "less than a sequence to evaluate": Case(
        lacking("--data-path --split --eval-iters", f"{WHOLE} @few"), "E304|few: has 4 tokens for validation"
    ),
    "nothing to train on": Case(on("text", "--split 0,100,0"), "E304|--split 0,100,0|training"),
    "test data after several sets for validation": Case(
        lacking("--data-path --split --eval-iters", f"{WHOLE} @text --test-data-path @text"),
        "E304|--multiple-validation-sets|--test-data-path",
    ),
    "missing list of data sets": Case(lacking("--data-path", "--data-args-path @list"), "E303|list|No such"),
    "a list of data sets that is no JSON": Case(
        lacking("--data-path --split", "--per-split-data-args-path @file"), "E303|file|JSON"
    ),
    "vocabulary too small": Case(on("text", "--vocab-size 100 --make-vocab-size-divisible-by 8"), "E305|token 256"),
    # flags
    "several missing": Case(
        lacking("--lr --train-iters --seq-length --eval-interval --micro-batch-size --vocab-size", "--save @new"),
        "E201|--seq-length, --micro-batch-size, --lr, --train-iters, --eval-interval, --save-interval|, --vocab-size",
    ),
    "like no other flag": Case(on("text", "--learning-rate 1"), "--learning-rate 1. --help lists all flags"),
    "heads": Case(on("text", "--num-attention-heads 5"), "num_attention_heads|Megatron refuses these settings"),
    "saves that fail": Case(
        on("text", "--optimizer sgd --async-save --use-persistent-ckpt-worker --save @new --save-interval 1"),
        "E203|--optimizer sgd|--async-save",
    ),
    "an optimizer of matrices": Case(on("text", "--optimizer muon"), "E209|--no-local-layer-fusion"),
    # checkpoints
    "no checkpoint": Case(on("text", "--load /nowhere --finetune"), "E404|--load /nowhere"),
    "none to read settings from": Case(
        on("text", "--load /nowhere --exit-on-missing-checkpoint --use-checkpoint-args"), "E404|--load"
    ),
    "other topk and rate, allowed": Case(
        resumed("--moe-router-topk 2 --lr 1e-3 --allow-changed-settings"),
        "E413|: --lr 0.004 in the checkpoint, 0.001 here. ",
    ),
    "a hybrid as GPT": Case(resumed(run="hybrid"), "E413|--hybrid-layer-pattern *E*E in the checkpoint"),
    "longer training": Case(resumed("--train-iters 8"), "do not match|--override-opt_param-scheduler", code=1),
    "dense as pretrained": Case(
        on("text", "--pretrained-checkpoint @dense"), "E413|--moe-relu-routing False in the checkpoint|remoe convert"
    ),
    "a λ that would jump": Case(
        on("text", "--finetune --load @remoe --moe-relu-l1-reg-coeff-multiplier 1.1"), "E413|1.2 in the checkpoint"
    ),
    # places
    "srun without ranks": Case(on("text"), "E203|srun|torchrun|--nnodes", environment={"SLURM_STEP_NUM_TASKS": "2"}),
    "mpirun": Case(on("text"), "E203|mpirun|torchrun|--nnodes", environment={"OMPI_COMM_WORLD_SIZE": "2"}),
    "--save-retain-interval with a release": Case(
        on("text", "--save @release --save-interval 1 --save-retain-interval 4"),
        "E203|--save-retain-interval|--save|release",
    ),
    "--save below a file": Case(on("text", "--save @file/x --save-interval 1"), "E105|--save|file/x|Not a directory"),
    "a loss that is not finite": Case(
        on("text", "--init-method-std inf"), "found NaN in local forward loss calculation|Lower --lr", code=1
    ),
    "MASTER_PORT in use": Case(
        on("text"), "DistNetworkError|EADDRINUSE|different MASTER_PORT", code=1, environment={"MASTER_PORT": ""}
    ),
}
