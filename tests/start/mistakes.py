"""Mistakes in the entry's flags and environment, and the messages that users must get."""

import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.tiny_model import RELU, TOPK
from tests.trainings import TINY

Arguments = Callable[["User"], list[str]]


@dataclass(frozen=True)
class User:
    """A user's files: data sets and checkpoints, whole and damaged."""

    folder: Path

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)

    def filled(self, words: Iterable[str]) -> list[str]:
        """Replace `{name}` by the path of a file."""
        return [re.sub(r"\{(\w+)\}", lambda name: self[name[1]], word) for word in words]


@dataclass(frozen=True)
class Case:
    """A user's arguments, and parts of the last error, separated by bars: its code, flags, files and values."""

    arguments: Arguments
    message: str
    code: int = 2
    environment: dict[str, str] | None = None
    unset: tuple[str, ...] = ()


def plain(flags: str = "", prefix: str = "text") -> Arguments:
    """Return the arguments of a training on a data set; words in braces are files of the user."""
    return lambda user: [*TINY, "--data-path", user[prefix], *user.filled(flags.split())]


def on(prefix: str, flags: str = "") -> Arguments:
    """Return the arguments of a ReMoE on a data set."""
    return plain(f"{' '.join(RELU)} {flags}", prefix)


def lacking(names: str, flags: str = "") -> Arguments:
    """Return the arguments of a ReMoE without these flags and their values."""

    def arguments(user: User) -> list[str]:
        words = on("text", flags)(user)
        for name in names.split():
            at = words.index(name)
            del words[at : at + 2]
        return words

    return arguments


def resumed(flags: str = "", routing: list[str] = RELU, run: str = "remoe") -> Arguments:
    """Return the arguments that resume the training of a checkpoint with other flags."""
    saving = f"--save-interval 2 --train-iters 2 --load {{{run}}} --save {{{run}}}"
    return plain(f"{' '.join(routing)} {saving} {flags}")


def two(flags: str = "") -> Arguments:
    """Return the arguments of a ReMoE on two data sets without weights."""
    return on("text", f"{flags} --data-path {{text}} {{text}}")


MAKE = "tools/preprocess_data.py"
HYBRID = "--hybrid-layer-pattern *E*E"
GPT2 = "--tokenizer-type GPT2BPETokenizer --vocab-file"
ENTRY = {
    # HybridModel
    "a hybrid without experts": Case(on("text", "--hybrid-layer-pattern *-*-"), "E202|*-*-"),
    "two patterns of experts": Case(on("text", f"{HYBRID} --moe-layer-freq ([0,1])"), "E202|--moe-layer-freq 0 1"),
    "layers of other packages": Case(on("text", "--hybrid-layer-pattern M*E"), "--hybrid-layer-pattern M*E|mamba-ssm"),
    "a hybrid of another pattern": Case(resumed("--hybrid-layer-pattern *-*E"), "E412|*-*E|--model hybrid"),
    "a hybrid as GPT": Case(resumed(run="hybrid"), "E412|'*E*E'|--model gpt"),
    "a hybrid of other layers": Case(
        resumed("--hybrid-layer-pattern *E*E*E", run="hybrid"), "E411|--hybrid-layer-pattern *E*E in the checkpoint"
    ),
    "a distributed optimizer's state for another class": Case(
        resumed(f"--use-distributed-optimizer {HYBRID}", run="distributed"),
        "E414|--dist-ckpt-optim-fully-reshardable|--no-load-optim",
    ),
    # data; tests/data has all kinds of damage
    "no data": Case(lacking("--data-path"), "E301|--data-path|--mock-data"),
    "missing data": Case(on("nowhere"), f"E301|--data-path|nowhere.idx|nowhere.bin|{MAKE}"),
    "with suffix": Case(on("text.bin"), "E301|text.bin|suffix"),
    "truncated .bin": Case(on("short_bin"), f"E302|short_bin.bin|1,000 bytes|{MAKE}"),
    "a flipped bit in a length": Case(on("flipped"), f"E302|flipped.idx|{MAKE}"),
    "less than a sequence": Case(on("few", "--split 100,0,0"), "E304|4 tokens|--seq-length 64"),
    "no document for validation": Case(on("one", "--eval-iters 1"), "E304|1 document(s)|validation|--split 90,10,0"),
    "no documents": Case(on("nothing"), "E304|0 document(s)|training"),
    "nothing to train on": Case(on("text", "--split 0,100,0"), "E304|--split 0,100,0|training"),
    "nothing to evaluate on": Case(on("text", "--split 100,0,0 --eval-iters 1"), "E304|--split 100,0,0|validation"),
    "sgd that is saved": Case(on("text", "--optimizer sgd --save new --save-interval 1"), "E203|--optimizer sgd"),
    "split of words": Case(on("text", "--split most,rest"), "E304|--split most,rest"),
    "weight that is none": Case(on("text", "--data-path 0.5 {text} half {one}"), "E301|--data-path 0.5"),
    "weight of 0": Case(on("text", "--data-path 0.5 {text} 0 {one}"), "E303|--data-path|0.0"),
    "negative weight": Case(on("text", "--data-path 0.5 {text} -1 {one}"), "E303|--data-path|-1.0"),
    "several data sets for more than an epoch": Case(
        two("--split 100,0,0 --train-iters 99999"), "E304|799,992|training|weight"
    ),
    "a data set that is too small to mix in": Case(
        on("text", "--split 100,0,0 --data-path {text} {few}"), "E304|few: |--seq-length 64|--split"
    ),
    "several data sets for too many evaluations": Case(two("--eval-iters 5000"), "E304|validation|weight"),
    "missing list of data sets": Case(lacking("--data-path", "--data-args-path {list}"), "E301|list|No such"),
    "a list of data sets that is no JSON": Case(
        lacking("--data-path --split", "--per-split-data-args-path {file}"), "E303|file|JSON"
    ),
    "missing validation data": Case(
        lacking("--data-path --split", "--train-data-path {text} --valid-data-path {nowhere} --test-data-path {text}"),
        f"E301|--valid-data-path|nowhere.idx|{MAKE}",
    ),
    "vocabulary too small": Case(on("text", "--vocab-size 100 --make-vocab-size-divisible-by 8"), "E305|token 256"),
    "negative id": Case(on("negative", "--split 100,0,0"), "E305|token -7|384"),
    "bytes for GPT-2's vocabulary": Case(
        lacking("--vocab-size", f"{GPT2} {{vocabulary}} --merge-file {{merges}}"),
        "E305|--data-path|257|50304|NullTokenizer",
    ),
    "vocabulary that is no JSON": Case(plain(f"{GPT2} {{file}} --merge-file {{file}}"), "E307|--vocab-file|file"),
    # flags
    "several missing": Case(lacking("--lr --train-iters --seq-length"), "E201|--seq-length, --lr, --train-iters"),
    "no vocabulary": Case(lacking("--vocab-size"), "E201|--vocab-size (with --tokenizer-type NullTokenizer)"),
    "misspelled": Case(on("text", "--num-expert 8"), "--num-expert 8|Did you mean --num-experts"),
    "like no other flag": Case(on("text", "--learning-rate 1"), "--learning-rate 1. --help lists all flags"),
    "heads": Case(on("text", "--num-attention-heads 5"), "num_attention_heads|Megatron refuses these settings"),
    "files of tokens per expert": Case(on("text", "--save-tokens-per-expert-interval 1"), "E203|metrics.jsonl"),
    "whole validation": Case(on("text", "--full-validation"), "E203|--full-validation|--multiple-validation-sets"),
    "whole validation in virtual stages": Case(
        on(
            "text",
            "--full-validation --multiple-validation-sets --num-layers 4 --pipeline-model-parallel-size 2 "
            "--num-virtual-stages-per-pipeline-rank 2",
        ),
        "E203|--full-validation|virtual pipeline stages",
        environment={"WORLD_SIZE": "2"},
    ),
    "several validation sets and a test": Case(
        on("text", "--full-validation --multiple-validation-sets --split 80,10,10"),
        "E304|--multiple-validation-sets|--split",
    ),
    "saving to nowhere": Case(
        on("text", "--save {new} --save-interval 2 --non-persistent-save-interval 1"),
        "E203|--non-persistent-save-interval|--non-persistent-ckpt-type global",
    ),
    "profile on a CPU": Case(on("text", "--profile"), "E203|--profile|--use-pytorch-profiler"),
    "a growing batch": Case(
        on("text", "--rampup-batch-size 4 4 8"), "E203|--rampup-batch-size|--step-batch-size-schedule"
    ),
    "data of another kind": Case(on("text", "--fim-data --log-straggler"), "E203|--fim-data|--log-straggler"),
    "documents with masks": Case(on("text", "--dataloader-inter-document-masking"), "E203|--dataloader-inter-document"),
    "logits of another model": Case(on("text", "--logits-load-dir {new}"), "E203|--logits-load-dir"),
    "a CUDA graph on a CPU": Case(
        on("text", "--cuda-graph-impl transformer_engine --cuda-graph-modules attn"),
        "E203|--cuda-graph-impl|Leave it out",
    ),
    "kernels without a GPU": Case(
        on("text", "--moe-kernels triton"), "E102|--moe-kernels triton|no GPU", unset=("TRITON_INTERPRET",)
    ),
    "layers that are no layers": Case(
        on("text", "--moe-layer-freq [0,1,1]"), "AssertionError|moe_layer_pattern: 3, expected 2", code=1
    ),
    # checkpoints
    "no checkpoint": Case(on("text", "--load /nowhere --finetune"), "E404|--load /nowhere"),
    "none to read settings from": Case(
        on("text", "--load /nowhere --exit-on-missing-checkpoint --use-checkpoint-args"), "E404|--load"
    ),
    "none, exit wanted": Case(on("text", "--load /nowhere --exit-on-missing-checkpoint"), "E404|--load /nowhere"),
    "other width": Case(resumed("--hidden-size 128"), "E411|--hidden-size 64 in the checkpoint, 128 here. "),
    "finer experts": Case(resumed("--moe-granularity 2"), "E411|: --moe-granularity 1 in the checkpoint, 2 here. "),
    "other attention": Case(resumed("--qk-layernorm"), "E411|--qk-layernorm False in the checkpoint, (on) here"),
    "other rotation": Case(
        resumed("--rotary-interleaved --lr-warmup-init 1e-5"), "E413|--rotary-interleaved False in the checkpoint"
    ),
    "other warm-up": Case(resumed("--lr-warmup-init 1e-5"), "E415|--lr-warmup-init 0.0 in the checkpoint, 1e-05 here"),
    "other topk": Case(resumed("--moe-router-topk 2"), "E413|--moe-router-topk 1 in the checkpoint, 2 here"),
    "other α": Case(resumed("--moe-relu-l1-reg-coeff-multiplier 1.5"), "E413|1.2 in the checkpoint, 1.5 here"),
    "longer training": Case(
        resumed("--train-iters 8"), "E415|: --train-iters 2 in the checkpoint, 8 here. |--override-opt_param-scheduler"
    ),
    "other split and initialization": Case(
        resumed("--split 80,20,0 --init-method-std 0.01"),
        "E413|--split 90,10,0 in the checkpoint, 80,20,0 here; --init-method-std 0.02|--allow-changed-settings",
    ),
    "other data": Case(
        resumed("--data-path 1 {text} 1.0 {one} --split 100,0,0"),
        "E413|--data-path text in the checkpoint, 1.0 text 1.0 one here",
    ),
    "other topk and rate, allowed": Case(
        resumed("--moe-router-topk 2 --lr 1e-3 --allow-changed-settings"),
        "E413|: --lr 0.004 in the checkpoint, 0.001 here. ",
    ),
    "distributed optimizer": Case(resumed("--use-distributed-optimizer"), "E414|--use-distributed-optimizer"),
    "ordinary optimizer": Case(resumed(run="distributed"), "E414|--use-distributed-optimizer. Add it|--no-load-optim"),
    "optimizer of another layout": Case(
        resumed("--use-distributed-optimizer --expert-model-parallel-size 2", run="distributed"),
        "E414|--expert-model-parallel-size 1 in the checkpoint, 2 here|--dist-ckpt-optim-fully-reshardable",
        environment={"WORLD_SIZE": "2"},
    ),
    "optimizer of other layers": Case(
        resumed("--use-distributed-optimizer --no-local-layer-fusion", run="distributed"),
        "E414|grouped experts. Leave out --no-local-layer-fusion|--no-load-optim",
    ),
    "top-k under ReLU": Case(resumed(run="topk"), "E412|top-k|remoe convert"),
    "dense as pretrained": Case(
        on("text", "--pretrained-checkpoint {dense}"), "E412|--pretrained-checkpoint|dense|remoe convert"
    ),
    "ReMoE under top-k": Case(resumed(routing=TOPK), "E412|--moe-relu-routing"),
    "nothing pretrained": Case(on("text", "--pretrained-checkpoint /nowhere"), "E404|--pretrained-checkpoint"),
    "truncated checkpoint": Case(on("text", "--finetune --load {cut}"), "E401|--load|truncated"),
    "no such iteration": Case(resumed("--ckpt-step 7"), "E402|--ckpt-step 7|Iteration 2 "),
    "NaN in the weights": Case(
        on("text", "--finetune --load {nan}"), "E406|--load|decoder.final_layernorm.weight|--ckpt-step", code=1
    ),
    "a new training over old": Case(on("text", "--save {remoe} --save-interval 2"), "E407|--save|iteration 2"),
    # places
    "--save below a file": Case(on("text", "--save {file}/x --save-interval 1"), "E105|--save|file/x|Not a directory"),
    "--data-cache-path": Case(on("text", "--data-cache-path {file}/x"), "E105|--data-cache-path"),
    # environment
    "RANK is a word": Case(on("text"), "E101|RANK='first'|torchrun", environment={"RANK": "first"}),
    "RANK too large": Case(on("text"), "E101|RANK=2 |WORLD_SIZE=2", environment={"RANK": "2", "WORLD_SIZE": "2"}),
    "no MASTER_ADDR": Case(on("text"), "E101|MASTER_ADDR is not", unset=("MASTER_ADDR",)),
    "MASTER_PORT too large": Case(on("text"), "E101|MASTER_PORT='99999'|65535", environment={"MASTER_PORT": "99999"}),
    "no GPU on the second of two nodes": Case(
        lambda user: [word for word in on("text")(user) if word != "--cpu"],
        f"E107|rank 2 on {socket.gethostname()}|GPU|--cpu",
        environment={"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}
        | {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "-1"},
    ),
    "MASTER_PORT in use": Case(
        on("text"), "DistNetworkError|EADDRINUSE|choose another MASTER_PORT", code=1, environment={"MASTER_PORT": ""}
    ),
}
