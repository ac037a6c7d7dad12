"""What users get wrong in the flags and environment of the entry, and what they have to be told."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.trainings import TINY
from tools.common.tiny_model import RELU, TOPK


@dataclass(frozen=True)
class User:
    """The files of somebody who trains: data sets and checkpoints, whole and not."""

    folder: Path

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)

    def filled(self, words: Iterable[str]) -> list[str]:
        """Replace `{name}` by the path of a file."""
        return [re.sub(r"\{(\w+)\}", lambda name: self[name[1]], word) for word in words]


def base(user: User, prefix: str = "text") -> list[str]:
    return [*TINY, "--num-workers", "0", "--data-path", user[prefix]]


def on(prefix: str, *more: str) -> Callable[[User], list[str]]:
    """A ReMoE on a data set; words in braces are files of the user's."""
    return lambda user: [*base(user, prefix), *RELU, *user.filled(more)]


def plain(*more: str) -> Callable[[User], list[str]]:
    """No routing but by `more`."""
    return lambda user: [*base(user), *user.filled(more)]


def lacking(*names: str, more: tuple[str, ...] = ()) -> Callable[[User], list[str]]:
    """A ReMoE without these flags and their values."""

    def arguments(user: User) -> list[str]:
        flags = base(user)
        for name in names:
            at = flags.index(name)
            del flags[at : at + 2]
        return [*flags, *RELU, *user.filled(more)]

    return arguments


def resumed(*more: str, routing: list[str] = RELU, run: str = "remoe") -> Callable[[User], list[str]]:
    """The training that saved a checkpoint, started again with other flags."""
    saving = ["--save-interval", "2", "--train-iters", "2"]
    return plain(*routing, *saving, "--load", f"{{{run}}}", "--save", f"{{{run}}}", *more)


def two(*more: str) -> Callable[[User], list[str]]:
    """A ReMoE on two data sets without weights."""
    return on("text", *more, "--data-path", "{text}", "{text}")


@dataclass(frozen=True)
class Case:
    """What the user gives, and what the last lines name, between bars: the error's code, flags, files and values."""

    arguments: Callable[[User], list[str]]
    message: str
    code: int = 2
    environment: dict[str, str] | None = None
    unset: tuple[str, ...] = ()


MAKE = "tools/preprocess_data.py"
HYBRID = ["--hybrid-layer-pattern", "*E*E"]
ENTRY = {
    # HybridModel
    "a hybrid without experts": Case(on("text", "--hybrid-layer-pattern", "*-*-"), "E202|*-*-"),
    "experts of no number": Case(plain(*HYBRID), "E202|--num-experts"),
    "two patterns of experts": Case(on("text", *HYBRID, "--moe-layer-freq", "([0,1])"), "E202|--moe-layer-freq 0 1"),
    "what a hybrid leaves out": Case(on("text", *HYBRID, "--use-rope-scaling"), "E202|--use-rope-scaling"),
    "layers of other packages": Case(
        on("text", "--hybrid-layer-pattern", "M*E"),
        "--hybrid-layer-pattern M*E: there are no plain PyTorch layers for M|* (attention)|mamba-ssm",
    ),
    "a hybrid of another pattern": Case(resumed("--hybrid-layer-pattern", "*-*E"), "E412|*-*E"),
    "a hybrid as GPT": Case(resumed(run="hybrid"), "E412|'*E*E'"),
    "a hybrid of other layers": Case(
        resumed("--hybrid-layer-pattern", "*E*E*E", run="hybrid"),
        "E411|--hybrid-layer-pattern *E*E in the checkpoint, *E*E*E here",
    ),
    "a distributed optimizer's state for another class": Case(
        resumed("--use-distributed-optimizer", *HYBRID, run="distributed"),
        "E414|--dist-ckpt-optim-fully-reshardable|--no-load-optim",
    ),
    # data
    "no data": Case(lacking("--data-path"), "E301|--data-path|--mock-data"),
    "missing data": Case(on("nowhere"), "E301|--data-path|nowhere.idx|nowhere.bin|tools/preprocess_data.py"),
    "only .idx": Case(on("no_bin"), "E301|no_bin.bin|tools/preprocess_data.py"),
    "only .bin": Case(on("no_idx"), "E301|no_idx.idx|tools/preprocess_data.py"),
    "with suffix": Case(on("text.bin"), "E301|text.bin|suffix"),
    "truncated .bin": Case(on("short_bin"), "E302|short_bin.bin|1,000 bytes|tools/preprocess_data.py"),
    "truncated .idx": Case(on("short_idx"), "E302|short_idx.idx|100 bytes|tools/preprocess_data.py"),
    "bad magic": Case(on("magic"), "E302|magic.idx|header|tools/preprocess_data.py"),
    "empty files": Case(on("empty"), "E302|empty.idx|0 bytes|tools/preprocess_data.py"),
    "too many sequences": Case(on("huge"), "E302|huge.idx|tools/preprocess_data.py"),
    "a flipped bit in a length": Case(on("flipped"), "E302|flipped.idx|tools/preprocess_data.py"),
    "longer .bin": Case(on("long_bin"), "E302|long_bin.bin|tools/preprocess_data.py"),
    "less than a sequence": Case(on("few", "--split", "100,0,0"), "E304|4 tokens|--seq-length 64"),
    "no document for validation": Case(on("one", "--eval-iters", "1"), "E304|1 document |validation|--split 90,10,0"),
    "no document for a test": Case(on("one", "--split", "90,0,10"), "E304|test split|--split 90,0,10"),
    "no documents": Case(on("nothing"), "E304|0 documents|training"),
    "nothing to train on": Case(on("text", "--split", "0,100,0"), "E304|--split 0,100,0"),
    "split of words": Case(on("text", "--split", "most,rest"), "E304|--split most,rest"),
    "split of four": Case(on("text", "--split", "90,5,4,1"), "E304|--split 90,5,4,1"),
    "weight that is none": Case(
        on("text", "--data-path", "0.5", "{text}", "half", "{one}"),
        "E301|--data-path 0.5",
    ),
    "negative weight": Case(
        on("text", "--data-path", "0.5", "{text}", " -1", "{one}"),
        "E303|--data-path|-1.0",
    ),
    "several data sets for more than an epoch": Case(
        two("--split", "100,0,0", "--train-iters", "99999"), "E304|799,992|training|weight"
    ),
    "a data set that is too small to mix in": Case(
        on("text", "--split", "100,0,0", "--data-path", "{text}", "{few}"),
        "E304|few: |--seq-length 64|--split",
    ),
    "several data sets for too many evaluations": Case(two("--eval-iters", "5000"), "E304|validation|weight"),
    "missing list of data sets": Case(lacking("--data-path", more=("--data-args-path", "{list}")), "E301|list|No such"),
    "missing validation data": Case(
        lacking(
            *["--data-path", "--split"],
            more=tuple("--train-data-path {text} --valid-data-path {nowhere} --test-data-path {text}".split()),
        ),
        "E301|--valid-data-path|nowhere.idx|tools/preprocess_data.py",
    ),
    "vocabulary too small": Case(
        on("text", "--vocab-size", "100", "--make-vocab-size-divisible-by", "8"), "E305|token 256"
    ),
    "a large id at the end": Case(on("large", "--split", "100,0,0"), "E305|token 70000|384"),
    "negative id": Case(on("negative", "--split", "100,0,0"), "E305|token -7|384"),
    "bytes for GPT-2's vocabulary": Case(
        lacking(
            "--vocab-size",
            more=("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", "{vocabulary}", "--merge-file", "{merges}"),
        ),
        "E305|--data-path|257|50304|NullTokenizer",
    ),
    "vocabulary that is no JSON": Case(
        plain(*"--tokenizer-type GPT2BPETokenizer --vocab-file {file} --merge-file {file}".split()),
        "--vocab-file|file",
    ),
    # flags
    "no sequence length": Case(lacking("--seq-length"), "E201|--seq-length"),
    "no evaluation interval": Case(lacking("--eval-interval"), "E201|--eval-interval"),
    "several missing": Case(lacking("--lr", "--train-iters"), "E201|--lr, --train-iters"),
    "no vocabulary": Case(lacking("--vocab-size"), "E201|--vocab-size (with --tokenizer-type NullTokenizer)"),
    "saving without interval": Case(plain("--save", "{new}"), "E201|--save-interval (with --save)"),
    "misspelled": Case(on("text", "--num-expert", "8"), "--num-expert 8|Did you mean --num-experts"),
    "unknown": Case(on("text", "--xyzzy"), "unrecognized arguments: --xyzzy. --help lists all flags"),
    "like no other flag": Case(on("text", "--learning-rate", "1"), "--learning-rate 1. --help lists all flags"),
    "word for a number": Case(on("text", "--num-layers", "two"), "--num-layers|'two'"),
    "unknown choice": Case(on("text", "--lr-decay-style", "cosin"), "--lr-decay-style|'cosin'|linear|cosine"),
    "both halves": Case(on("text", "--bf16", "--fp16"), "--fp16 needs an accelerator|--bf16"),
    "experts over ranks": Case(on("text", "--expert-model-parallel-size", "3"), "experts|multiple|parallel"),
    "too few ranks": Case(on("text", "--tensor-model-parallel-size", "2", "--sequence-parallel"), "world size (1)"),
    "heads": Case(on("text", "--num-attention-heads", "5"), "num_attention_heads|Megatron refuses these settings"),
    "batch": Case(on("text", "--global-batch-size", "7"), "must be divisible by|(7)"),
    "whole validation": Case(
        on("text", "--eval-iters", "1", "--full-validation"), "E203|--full-validation|--multiple-validation-sets"
    ),
    "several validation sets": Case(
        on("text", "--multiple-validation-sets"), "E203|--multiple-validation-sets|--full-"
    ),
    "several validation sets and a test": Case(
        on("text", *"--full-validation --multiple-validation-sets --split 80,10,10".split()),
        "E304|--multiple-validation-sets|--split",
    ),
    "names of validation sets": Case(
        on("text", "--validation-set-names", "a", "b"), "E203|--validation-set-names|--multiple-validation-sets"
    ),
    "saving to nowhere": Case(
        on("text", *"--save {new} --save-interval 2 --non-persistent-save-interval 1".split()),
        "E203|--non-persistent-save-interval|--non-persistent-ckpt-type global",
    ),
    "async save on a CPU": Case(
        on(
            "text",
            *"--save {new} --save-interval 1 --async-save --use-persistent-ckpt-worker --async-strategy mcore".split(),
        ),
        "E203|--async-save",
    ),
    "profile on a CPU": Case(on("text", "--profile"), "E203|--profile|--use-pytorch-profiler"),
    "routing combination": Case(on("text", "--moe-expert-capacity-factor", "1.0"), "E204|--moe-expert-capacity-factor"),
    "kernels without a GPU": Case(
        on("text", "--moe-kernels", "triton"), "E102|--moe-kernels triton|no GPU", unset=("TRITON_INTERPRET",)
    ),
    "layers that are no layers": Case(
        on("text", "--moe-layer-freq", "[0,1,1]"), "AssertionError|moe_layer_pattern: 3, expected 2", code=1
    ),
    # checkpoints
    "no checkpoint": Case(on("text", "--load", "/nowhere", "--finetune"), "E404|--load /nowhere"),
    "none, exit wanted": Case(on("text", "--load", "/nowhere", "--exit-on-missing-checkpoint"), "E404|--load /nowhere"),
    "other width": Case(resumed("--hidden-size", "128"), "E411|--hidden-size 64 in the checkpoint, 128 here|--load"),
    "other depth": Case(resumed("--num-layers", "3"), "E411|--num-layers 2 in the checkpoint, 3 here. "),
    "other experts": Case(resumed("--num-experts", "4"), "E411|--num-experts 8 in the checkpoint, 4 here"),
    "finer experts": Case(resumed("--moe-granularity", "2"), "E411|--moe-granularity 1 in the checkpoint, 2 here"),
    "other topk": Case(resumed("--moe-router-topk", "2"), "E413|--moe-router-topk 1 in the checkpoint, 2 here"),
    "other λ0": Case(resumed("--moe-relu-l1-reg-coeff-init", "1e-4"), "E413|-init 1e-08 in the checkpoint, 0.0001"),
    "other α": Case(resumed("--moe-relu-l1-reg-coeff-multiplier", "1.5"), "E413|1.2 in the checkpoint, 1.5 here"),
    "other learning rate": Case(resumed("--lr", "1e-3"), "E413|--lr 0.004 in the checkpoint, 0.001 here"),
    "longer training": Case(
        resumed("--train-iters", "8"),
        "E415|: --train-iters 2 in the checkpoint, 8 here. |--override-opt_param-scheduler",
    ),
    "other seed": Case(resumed("--seed", "1"), "E413|--seed 1234 in the checkpoint, 1 here. |--allow-changed-settings"),
    "other split and initialization": Case(
        resumed("--split", "80,20,0", "--init-method-std", "0.01"),
        "E413|--split 90,10,0 in the checkpoint, 80,20,0 here; --init-method-std 0.02 in the checkpoint, 0.01 here. ",
    ),
    "other batch size": Case(resumed("--global-batch-size", "4"), "E413|--global-batch-size 8 in the checkpoint, 4"),
    "other data": Case(
        resumed("--data-path", "1", "{text}", "1.0", "{one}", "--split", "100,0,0"),
        "E413|--data-path text in the checkpoint, 1.0 text 1.0 one here",
    ),
    "other weight decay": Case(resumed("--weight-decay", "0.1"), "E415|--weight-decay 0.01 in the checkpoint"),
    "other guard": Case(resumed("--moe-relu-layer-floor", "0"), "E413|0.001 in the checkpoint, 0.0 here"),
    "other topk and rate, allowed": Case(
        resumed("--moe-router-topk", "2", "--lr", "1e-3", "--allow-changed-settings"),
        "E413|: --lr 0.004 in the checkpoint, 0.001 here. ",
    ),
    "distributed optimizer": Case(resumed("--use-distributed-optimizer"), "E414|--use-distributed-optimizer"),
    "ordinary optimizer": Case(resumed(run="distributed"), "E414|--use-distributed-optimizer. Add it|--no-load-optim"),
    "optimizer of another layout": Case(
        resumed(*"--use-distributed-optimizer --expert-model-parallel-size 2".split(), run="distributed"),
        "E414|--expert-model-parallel-size 1 in the checkpoint, 2 here|--dist-ckpt-optim-fully-reshardable",
        environment={"WORLD_SIZE": "2"},
    ),
    "top-k under ReLU": Case(resumed(run="topk"), "E412|top-k|tools/convert_checkpoint"),
    "dense under ReLU": Case(resumed("--finetune", run="dense"), "E412|dense|tools/convert_checkpoint"),
    "nothing pretrained": Case(on("text", "--pretrained-checkpoint", "/nowhere"), "E404|--pretrained-checkpoint"),
    "dense as pretrained": Case(
        on("text", "--pretrained-checkpoint", "{dense}"),
        "E412|--pretrained-checkpoint|dense|tools/convert_checkpoint",
    ),
    "other width pretrained": Case(
        on("text", "--hidden-size", "128", "--pretrained-checkpoint", "{remoe}"),
        "E411|--pretrained-checkpoint|--hidden-size 64 in the checkpoint, 128 here",
    ),
    "truncated checkpoint": Case(on("text", "--finetune", "--load", "{cut}"), "E401|--load|truncated"),
    "no such iteration": Case(resumed("--ckpt-step", "7"), "E402|--ckpt-step 7|Iteration 2 "),
    "ReMoE under top-k": Case(resumed(routing=TOPK), "E412|--moe-relu-routing"),
    "NaN in the weights": Case(
        on("text", "--finetune", "--load", "{nan}"),
        "E406|--load|decoder.final_layernorm.weight|--ckpt-step",
        code=1,
    ),
    "a new training over old": Case(on("text", "--save", "{remoe}", "--save-interval", "2"), "E407|--save|iteration 2"),
    # places
    "--save below a file": Case(
        on("text", "--save", "{file}/x", "--save-interval", "1"), "E105|--save|file/x|Not a directory"
    ),
    "--save is a file": Case(on("text", "--save", "{file}", "--save-interval", "1"), "E105|--save|File exists"),
    "--tensorboard-dir": Case(on("text", "--tensorboard-dir", "/proc/x"), "E105|--tensorboard-dir /proc/x"),
    "--data-cache-path": Case(on("text", "--data-cache-path", "{file}/x"), "E105|--data-cache-path"),
    # environment
    "RANK is a word": Case(on("text"), "E101|RANK='first'|torchrun", environment={"RANK": "first"}),
    "RANK too large": Case(on("text"), "E101|RANK=2 |WORLD_SIZE=2", environment={"RANK": "2", "WORLD_SIZE": "2"}),
    "WORLD_SIZE is a word": Case(on("text"), "E101|WORLD_SIZE='many'", environment={"WORLD_SIZE": "many"}),
    "no MASTER_ADDR": Case(on("text"), "E101|MASTER_ADDR is not", unset=("MASTER_ADDR",)),
    "MASTER_PORT too large": Case(on("text"), "E101|MASTER_PORT='99999'|65535", environment={"MASTER_PORT": "99999"}),
    "MASTER_PORT in use": Case(
        on("text"), "DistNetworkError|EADDRINUSE|choose another MASTER_PORT", code=1, environment={"MASTER_PORT": ""}
    ),
}
