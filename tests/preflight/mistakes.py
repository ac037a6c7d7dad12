"""What users get wrong in the flags and environment of the entry, and what they have to be told."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.gpt2_reference import gpt2_files
from tests.trainings import TINY
from tools.common.tiny_model import RELU, TOPK


@dataclass(frozen=True)
class User:
    """The files of somebody who trains: data sets and checkpoints, whole and not."""

    folder: Path

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)


def without(flags: list[str], *names: str) -> list[str]:
    flags = list(flags)
    for name in names:
        at = flags.index(name)
        del flags[at : at + 2]
    return flags


def base(user: User, prefix: str = "text") -> list[str]:
    return [*TINY, "--num-workers", "0", "--data-path", user[prefix]]


def on(prefix: str, *more: str) -> Callable[[User], list[str]]:
    """A ReMoE on a data set."""
    return lambda user: [*base(user, prefix), *RELU, *more]


def lacking(*names: str) -> Callable[[User], list[str]]:
    return lambda user: [*without(base(user), *names), *RELU]


def resumed(*more: str, routing: list[str] = RELU, run: str = "remoe") -> Callable[[User], list[str]]:
    """The training that saved a checkpoint, started again with other flags."""
    saving = ["--save-interval", "2", "--train-iters", "2"]
    return lambda user: [*base(user), *routing, *saving, "--load", user[run], "--save", user[run], *more]


def two(*more: str) -> Callable[[User], list[str]]:
    """A ReMoE on two data sets without weights."""
    return lambda user: [*on("text", *more)(user), "--data-path", user["text"], user["text"]]


def within(flag: str, name: str) -> Callable[[User], list[str]]:
    """A folder to write into where there can be none."""
    more = ["--save-interval", "1"] if flag == "--save" else []
    return lambda user: [*base(user), *RELU, *more, flag, name if name.startswith("/") else user[name]]


@dataclass(frozen=True)
class Case:
    """What the user gives, and what the last lines have to say."""

    arguments: Callable[[User], list[str]]
    message: tuple[str, ...]
    code: int = 2
    environment: dict[str, str] | None = None
    unset: tuple[str, ...] = ()


SCHEDULE = "--override-opt_param-scheduler"
ANEW = "--finetune with another --save"
MAKE = "tools/preprocess_data.py"
WEIGHT = "put one number before each prefix"
HYBRID = ["--hybrid-layer-pattern", "*E*E"]
ENTRY = {
    # HybridModel
    "a hybrid without experts": Case(
        on("text", "--hybrid-layer-pattern", "*-*-"), ("--hybrid-layer-pattern *-*- has no MoE layer (E)", "'*E*E'")
    ),
    "experts of no number": Case(
        lambda user: [*base(user), *HYBRID], ("--hybrid-layer-pattern *E*E has MoE layers (E): give --num-experts",)
    ),
    "two patterns of experts": Case(
        on("text", *HYBRID, "--moe-layer-freq", "([0,1])"), ("--moe-layer-freq 0 1: --hybrid-layer-pattern *E*E",)
    ),
    "what a hybrid leaves out": Case(
        on("text", *HYBRID, "--use-rope-scaling"), ("--use-rope-scaling: HybridModel does not",)
    ),
    "layers of other packages": Case(
        on("text", "--hybrid-layer-pattern", "M*E"),
        ("--hybrid-layer-pattern M*E: there are no plain PyTorch layers for M", "* (attention)", "mamba-ssm"),
    ),
    "a hybrid of another pattern": Case(
        resumed("--hybrid-layer-pattern", "*-*E"),
        ("holds a GPTModel, which Megatron reads", "*-*E has - and E: use tools/convert_checkpoint --model hybrid"),
    ),
    "a hybrid as GPT": Case(
        resumed(run="hybrid"), ("holds a HybridModel: add --hybrid-layer-pattern '*E*E'", "--model gpt")
    ),
    "a hybrid of other layers": Case(
        resumed("--hybrid-layer-pattern", "*E*E*E", run="hybrid"),
        ("another shape: --hybrid-layer-pattern *E*E in the checkpoint, *E*E*E here",),
    ),
    "a distributed optimizer's state for another class": Case(
        resumed("--use-distributed-optimizer", *HYBRID, run="distributed"),
        ("state was saved for GPTModel alone", "--dist-ckpt-optim-fully-reshardable", "--no-load-optim"),
    ),
    # data
    "no data": Case(lacking("--data-path"), ("--data-path is missing", "--mock-data")),
    "missing data": Case(on("nowhere"), ("--data-path", "nowhere.idx", "nowhere.bin", MAKE)),
    "only .idx": Case(on("no_bin"), ("there is no", "no_bin.bin", MAKE)),
    "only .bin": Case(on("no_idx"), ("there is no", "no_idx.idx", MAKE)),
    "with suffix": Case(on("text.bin"), ("text.bin: give the prefix without suffix:",)),
    "truncated .bin": Case(on("short_bin"), ("short_bin.bin is truncated or corrupt: it has 1,000 bytes", MAKE)),
    "truncated .idx": Case(on("short_idx"), ("short_idx.idx is truncated or corrupt: it has 100 bytes", MAKE)),
    "bad magic": Case(on("magic"), ("magic.idx is truncated or corrupt", "header", MAKE)),
    "empty files": Case(on("empty"), ("empty.idx is truncated or corrupt", "0 bytes", MAKE)),
    "too many sequences": Case(on("huge"), ("huge.idx is truncated or corrupt", MAKE)),
    "a flipped bit in a length": Case(on("flipped"), ("flipped.idx is truncated or corrupt", MAKE)),
    "longer .bin": Case(on("long_bin"), ("long_bin.bin is truncated or corrupt", MAKE)),
    "less than a sequence": Case(
        on("few", "--split", "100,0,0"), ("has 4 tokens", "--seq-length 64", "Give more data")
    ),
    "no document for validation": Case(
        on("one", "--eval-iters", "1"), ("1 document the validation split gets nothing (--split 90,10,0)", "100,0,0")
    ),
    "no document for a test": Case(on("one", "--split", "90,0,10"), ("the test split gets nothing (--split 90,0,10)",)),
    "no documents": Case(on("nothing"), ("0 documents the training split gets nothing", "Give more documents")),
    "nothing to train on": Case(on("text", "--split", "0,100,0"), ("--split 0,100,0: leaves nothing to train on",)),
    "split of words": Case(on("text", "--split", "most,rest"), ("--split most,rest: give up to three numbers",)),
    "split of four": Case(on("text", "--split", "90,5,4,1"), ("--split 90,5,4,1: give up to three numbers",)),
    "weight that is none": Case(
        lambda user: [*lacking("--data-path")(user), "--data-path", "0.5", user["text"], "half", user["one"]],
        ("--data-path 0.5: there is no", WEIGHT),
    ),
    "negative weight": Case(
        lambda user: [*lacking("--data-path")(user), "--data-path", "0.5", user["text"], " -1", user["one"]],
        ("--data-path", "-1.0", "at least 0"),
    ),
    "several data sets for more than an epoch": Case(
        two("--split", "100,0,0", "--train-iters", "99999"),
        ("799,992 sequences are wanted for training, and the 2 data sets have", "Put a weight before each"),
    ),
    "a data set that is too small to mix in": Case(
        lambda user: [*on("text", "--split", "100,0,0")(user), "--data-path", user["text"], user["few"]],
        ("few: has not even one sequence of --seq-length 64 for training", "Leave it out, or give another --split"),
    ),
    "several data sets for too many evaluations": Case(
        two("--eval-iters", "5000"), ("sequences are wanted for validation", "Put a weight before each")
    ),
    "missing list of data sets": Case(
        lambda user: [*lacking("--data-path")(user), "--data-args-path", user["list"]],
        ("list cannot be read (No such",),
    ),
    "missing validation data": Case(
        lambda user: [
            *without(base(user), "--data-path", "--split"),
            *["--train-data-path", user["text"], "--valid-data-path", user["nowhere"]],
            *["--test-data-path", user["text"]],
        ],
        ("--valid-data-path", "nowhere.idx", MAKE),
    ),
    "vocabulary too small": Case(
        on("text", "--vocab-size", "100", "--make-vocab-size-divisible-by", "8"),
        ("holds token 256, and the vocabulary has 104", "Give the tokenizer that the data was made with"),
    ),
    "a large id at the end": Case(
        on("large", "--split", "100,0,0"), ("holds token 70000, and the vocabulary has 384",)
    ),
    "negative id": Case(on("negative", "--split", "100,0,0"), ("holds token -7, and the vocabulary has 384",)),
    "bytes for GPT-2's vocabulary": Case(
        lambda user: [
            *without(base(user), "--vocab-size"),
            *["--tokenizer-type", "GPT2BPETokenizer"],
            *[
                word
                for pair in zip(("--vocab-file", "--merge-file"), gpt2_files(), strict=True)
                for word in map(str, pair)
            ],
        ],
        ("--data-path", "text: the ids of", "below 257", "50304", "--tokenizer-type NullTokenizer"),
    ),
    "vocabulary that is no JSON": Case(
        lambda user: [
            *base(user),
            *["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", user["file"], "--merge-file", user["file"]],
        ],
        ("--vocab-file", "file"),
    ),
    # flags
    "no sequence length": Case(lacking("--seq-length"), ("Missing: --seq-length", "Give a value")),
    "no evaluation interval": Case(lacking("--eval-interval"), ("Missing: --eval-interval",)),
    "several missing": Case(lacking("--lr", "--train-iters"), ("Missing: --lr, --train-iters",)),
    "no vocabulary": Case(lacking("--vocab-size"), ("Missing: --vocab-size (with --tokenizer-type NullTokenizer)",)),
    "saving without interval": Case(
        lambda user: [*base(user), "--save", user["new"]], ("Missing: --save-interval (with --save)",)
    ),
    "misspelled": Case(on("text", "--num-expert", "8"), ("--num-expert 8", "Did you mean --num-experts")),
    "unknown": Case(on("text", "--xyzzy"), ("unrecognized arguments: --xyzzy. --help lists all flags",)),
    "word for a number": Case(on("text", "--num-layers", "two"), ("--num-layers", "'two'")),
    "unknown choice": Case(
        on("text", "--lr-decay-style", "cosin"), ("--lr-decay-style", "'cosin'", "linear", "cosine")
    ),
    "both halves": Case(on("text", "--bf16", "--fp16"), ("--fp16 needs an accelerator", "--bf16")),
    "experts over ranks": Case(on("text", "--expert-model-parallel-size", "3"), ("experts", "multiple", "parallel")),
    "too few ranks": Case(
        on("text", "--tensor-model-parallel-size", "2", "--sequence-parallel"), ("world size (1) is not divisible",)
    ),
    "heads": Case(on("text", "--num-attention-heads", "5"), ("num_attention_heads", "Megatron refuses these settings")),
    "batch": Case(on("text", "--global-batch-size", "7"), ("must be divisible by", "(7)")),
    "whole validation": Case(
        on("text", "--eval-iters", "1", "--full-validation"), ("--full-validation", "Give --multiple-validation-sets")
    ),
    "several validation sets": Case(
        on("text", "--multiple-validation-sets"), ("--multiple-validation-sets", "with --full-validation")
    ),
    "several validation sets and a test": Case(
        on("text", *"--full-validation --multiple-validation-sets --split 80,10,10".split()),
        ("--multiple-validation-sets", "--split"),
    ),
    "names of validation sets": Case(
        on("text", "--validation-set-names", "a", "b"), ("--validation-set-names", "Add --multiple-validation-sets")
    ),
    "saving to nowhere": Case(
        lambda user: [
            *on("text", *"--save-interval 2 --non-persistent-save-interval 1".split())(user),
            "--save",
            user["new"],
        ],
        ("--non-persistent-save-interval", "Add --non-persistent-ckpt-type global"),
    ),
    "async save on a CPU": Case(
        lambda user: [
            *on("text", "--save-interval", "1", "--save", user["new"])(user),
            *"--async-save --use-persistent-ckpt-worker --async-strategy mcore".split(),
        ],
        ("--async-save needs a GPU", "Leave it out"),
    ),
    "profile on a CPU": Case(on("text", "--profile"), ("--profile needs a GPU", "--use-pytorch-profiler")),
    "routing combination": Case(
        on("text", "--moe-expert-capacity-factor", "1.0"),
        ("--moe-expert-capacity-factor 1.0 cannot be used", "dropless"),
    ),
    "kernels without a GPU": Case(
        on("text", "--moe-kernels", "triton"),
        ("--moe-kernels triton cannot be used here: there is no GPU. Leave it out",),
        unset=("TRITON_INTERPRET",),
    ),
    "layers that are no layers": Case(
        on("text", "--moe-layer-freq", "[0,1,1]"), ("AssertionError", "moe_layer_pattern: 3, expected 2"), code=1
    ),
    # checkpoints
    "no checkpoint": Case(on("text", "--load", "/nowhere", "--finetune"), ("--load /nowhere: holds no checkpoint",)),
    "no checkpoint, exit wanted": Case(
        on("text", "--load", "/nowhere", "--exit-on-missing-checkpoint"), ("--load /nowhere: holds no checkpoint",)
    ),
    "other width": Case(
        resumed("--hidden-size", "128"), ("--hidden-size 64 in the checkpoint, 128 here", "another --load")
    ),
    "other depth": Case(resumed("--num-layers", "3"), ("another shape: --num-layers 2 in the checkpoint, 3 here. ",)),
    "other experts": Case(
        resumed("--num-experts", "4"), ("--num-experts 8 in the checkpoint, 4 here", "another --load")
    ),
    "finer experts": Case(
        resumed("--moe-granularity", "2"), ("--moe-granularity 1 in the checkpoint, 2 here", "another --load")
    ),
    "other topk": Case(resumed("--moe-router-topk", "2"), ("--moe-router-topk 1 in the checkpoint, 2 here", ANEW)),
    "other λ0": Case(
        resumed("--moe-relu-l1-reg-coeff-init", "1e-4"), ("-init 1e-08 in the checkpoint, 0.0001 here", ANEW)
    ),
    "other α": Case(
        resumed("--moe-relu-l1-reg-coeff-multiplier", "1.5"), ("-multiplier 1.2 in the checkpoint, 1.5 here", ANEW)
    ),
    "other learning rate": Case(resumed("--lr", "1e-3"), ("--lr 0.004 in the checkpoint, 0.001 here", ANEW)),
    "longer training": Case(
        resumed("--train-iters", "8"), ("before: --train-iters 2 in the checkpoint, 8 here. ", SCHEDULE)
    ),
    "other seed": Case(
        resumed("--seed", "1"), ("--seed 1234 in the checkpoint, 1 here. ", ANEW, "--allow-changed-settings")
    ),
    "other split and initialization": Case(
        resumed("--split", "80,20,0", "--init-method-std", "0.01"),
        ("--split 90,10,0 in the checkpoint, 80,20,0 here; --init-method-std 0.02 in the checkpoint, 0.01 here. ",),
    ),
    "other batch size": Case(
        resumed("--global-batch-size", "4"), ("--global-batch-size 8 in the checkpoint, 4 here", ANEW)
    ),
    "other data": Case(
        lambda user: [*resumed()(user), "--data-path", "1", user["text"], "1.0", user["one"], "--split", "100,0,0"],
        ("--data-path text in the checkpoint, 1.0 text 1.0 one here", ANEW),
    ),
    "other weight decay": Case(
        resumed("--weight-decay", "0.1"), ("--weight-decay 0.01 in the checkpoint, 0.1 here", SCHEDULE)
    ),
    "other guard": Case(
        resumed("--moe-relu-layer-floor", "0"), ("--moe-relu-layer-floor 0.001 in the checkpoint, 0.0 here", ANEW)
    ),
    "other topk and rate, allowed": Case(
        resumed("--moe-router-topk", "2", "--lr", "1e-3", "--allow-changed-settings"),
        ("saved with: --lr 0.004 in the checkpoint, 0.001 here. ", ANEW),
    ),
    "distributed optimizer": Case(
        resumed("--use-distributed-optimizer"), ("is not that of --use-distributed-optimizer", "--no-load-optim")
    ),
    "ordinary optimizer": Case(
        resumed(run="distributed"), ("state is that of --use-distributed-optimizer. Add it", "--no-load-optim")
    ),
    "optimizer of another layout": Case(
        resumed(*"--use-distributed-optimizer --expert-model-parallel-size 2".split(), run="distributed"),
        ("--expert-model-parallel-size 1 in the checkpoint, 2 here", "--dist-ckpt-optim-fully-reshardable"),
        environment={"WORLD_SIZE": "2"},
    ),
    "top-k under ReLU": Case(resumed(run="topk"), ("holds a top-k MoE model", "tools/convert_checkpoint")),
    "dense under ReLU": Case(resumed("--finetune", run="dense"), ("holds a dense model", "tools/convert_checkpoint")),
    "nothing pretrained": Case(
        on("text", "--pretrained-checkpoint", "/nowhere"), ("--pretrained-checkpoint /nowhere: holds no checkpoint",)
    ),
    "dense as pretrained": Case(
        lambda user: on("text", "--pretrained-checkpoint", user["dense"])(user),
        ("--pretrained-checkpoint", "holds a dense model", "tools/convert_checkpoint"),
    ),
    "other width pretrained": Case(
        lambda user: on("text", "--hidden-size", "128", "--pretrained-checkpoint", user["remoe"])(user),
        ("--pretrained-checkpoint", "--hidden-size 64 in the checkpoint, 128 here"),
    ),
    "truncated checkpoint": Case(
        lambda user: on("text", "--finetune", "--load", user["cut"])(user),
        ("--load", "it is truncated", "No other checkpoint there is whole"),
    ),
    "no such iteration": Case(
        resumed("--ckpt-step", "7"), ("--ckpt-step 7: ", ".metadata is missing", "Iteration 2 is whole")
    ),
    "ReMoE under top-k": Case(resumed(routing=TOPK), ("holds a ReMoE: add --moe-relu-routing",)),
    "NaN in the weights": Case(
        lambda user: on("text", "--finetune", "--load", user["nan"])(user),
        ("--load", "decoder.final_layernorm.weight holds values that are not finite", "--ckpt-step"),
        code=1,
    ),
    # places
    "--save below a file": Case(within("--save", "file/x"), ("--save", "file/x: cannot be written (Not a directory)")),
    "--save is a file": Case(within("--save", "file"), ("--save", "file: cannot be written (File exists)")),
    "--tensorboard-dir": Case(
        within("--tensorboard-dir", "/proc/x"), ("--tensorboard-dir /proc/x: cannot be written",)
    ),
    "--data-cache-path": Case(within("--data-cache-path", "file/x"), ("--data-cache-path", "cannot be written")),
    # environment
    "RANK is a word": Case(on("text"), ("RANK='first'", "torchrun"), environment={"RANK": "first"}),
    "RANK too large": Case(
        on("text"),
        ("RANK=2 in the environment must be below WORLD_SIZE=2",),
        environment={"RANK": "2", "WORLD_SIZE": "2"},
    ),
    "WORLD_SIZE is a word": Case(on("text"), ("WORLD_SIZE='many'", "torchrun"), environment={"WORLD_SIZE": "many"}),
    "no MASTER_ADDR": Case(on("text"), ("MASTER_ADDR is not", "torchrun"), unset=("MASTER_ADDR",)),
    "MASTER_PORT too large": Case(on("text"), ("MASTER_PORT='99999'", "65535"), environment={"MASTER_PORT": "99999"}),
    "MASTER_PORT in use": Case(
        on("text"),
        ("DistNetworkError", "EADDRINUSE", "choose another MASTER_PORT"),
        code=1,
        environment={"MASTER_PORT": ""},
    ),
}
