"""What users get wrong in flags, files and environment: each ends at once, with a short message, and loses nothing."""

import hashlib
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.remoe.data.indexed import IndexedWriter, bin_path, idx_path
from megatron.remoe.preflight.checkpoint_files import read_index
from tests.trainings import REPOSITORY, TINY
from tools.common.data_sets import write_documents
from tools.common.tiny_model import RELU, TOPK

LIMIT = 30.0  # seconds for one case: longer is a hang
LINES = 3


class Entry:
    """The training entry, imported once."""

    def __init__(self, output: Path) -> None:
        self.output = output
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        self.process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests" / "entry_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | single | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, arguments: list[str], environment: dict[str, str], unset: list[str]) -> tuple[int | None, str]:
        """Exit code, None after the time limit, and all that was printed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"arguments": arguments, "environment": environment, "unset": unset, "limit": LIMIT}
        self.process.stdin.write(json.dumps(request | {"output": str(self.output)}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.strip() == "null" or line.strip().lstrip("-").isdecimal():
                return json.loads(line), self.output.read_text(errors="replace")
        raise AssertionError("the server of the entry has ended")


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Entry]:
    entry = Entry(tmp_path_factory.mktemp("entry") / "output")
    yield entry
    assert entry.process.stdin is not None
    entry.process.stdin.close()
    entry.process.wait(timeout=30)


@dataclass(frozen=True)
class User:
    """The files of somebody who trains: data sets and checkpoints, whole and not."""

    folder: Path

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)


def contents(folder: Path) -> dict[str, str]:
    """Path → hash of each file."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def copied(user: User, name: str) -> tuple[Path, Path]:
    """A copy of the data set, to be damaged: its .bin and .idx."""
    for path in (bin_path, idx_path):
        shutil.copy(path(user.folder / "text"), path(user.folder / name))
    return bin_path(user.folder / name), idx_path(user.folder / name)


def write_ids(prefix: Path, ids: list[int], kind: type) -> None:
    with IndexedWriter(prefix, np.dtype(kind)) as writer:
        writer.add(np.array(ids, dtype=kind), np.array([len(ids)]))
        writer.finish()
        writer.publish()


def make_data_sets(user: User, source: Path) -> None:
    for path in (bin_path, idx_path):
        shutil.copy(path(source), path(user.folder / "text"))
    copied(user, "no_bin")[0].unlink()
    copied(user, "no_idx")[1].unlink()
    os.truncate(copied(user, "short_bin")[0], 1000)
    os.truncate(copied(user, "short_idx")[1], 100)
    index = copied(user, "magic")[1]
    index.write_bytes(b"XXXXXXXX" + index.read_bytes()[8:])
    for path in copied(user, "empty"):
        os.truncate(path, 0)
    huge = copied(user, "huge")[1]  # tells of more sequences than there are
    data = bytearray(huge.read_bytes())
    struct.pack_into("<Q", data, 18, 1 << 60)
    huge.write_bytes(data)
    write_documents(user.folder / "few", [b"abc"])
    write_documents(user.folder / "one", [b"abc" * 1000])
    write_ids(user.folder / "negative", [5, -7, *[6] * 1000], np.int32)
    write_ids(user.folder / "large", [*[6] * 1000, 70_000], np.int32)
    write_ids(user.folder / "nothing", [], np.uint16)
    (user.folder / "file").write_text("a regular file\n")
    (user.folder / "folder").mkdir()


def put_nan(folder: Path, key: str) -> None:
    """Make a tensor of a checkpoint not a number, in its file."""
    entry = next(entry for index, entry in read_index(folder).storage_data.items() if index.fqn == key)
    path = folder / entry.relative_path
    data = bytearray(path.read_bytes())
    stored = data[entry.offset : entry.offset + entry.length]
    values = torch.load(io.BytesIO(stored), weights_only=True).numpy().tobytes()
    at = stored.index(values)
    stored[at : at + len(values)] = np.full(len(values) // 4, np.nan, np.float32).tobytes()
    data[entry.offset : entry.offset + entry.length] = stored
    path.write_bytes(data)


@pytest.fixture(scope="module")
def user(entry: Entry, data: Path, tmp_path_factory: pytest.TempPathFactory) -> User:
    user = User(tmp_path_factory.mktemp("user"))
    make_data_sets(user, data)
    distributed = [*RELU, "--use-distributed-optimizer"]
    for name, routing in (("remoe", RELU), ("distributed", distributed), ("topk", TOPK), ("dense", [])):
        saving = ["--save", user[name], "--save-interval", "2", "--train-iters", "2"]
        code, output = entry.run([*base(user), *routing, *saving], {}, [])
        assert code == 0, output[-3000:]
    shutil.copytree(user["remoe"], user["nan"])
    shutil.copytree(user["dense"], user["cut"])
    for file in (user.folder / "cut" / "iter_0000002").glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)
    put_nan(user.folder / "nan" / "iter_0000002", "decoder.final_layernorm.weight")
    return user


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
ENTRY = {
    # data
    "no data": Case(lacking("--data-path"), ("--data-path is missing", "--mock-data")),
    "missing data": Case(on("nowhere"), ("--data-path", "nowhere.idx", "nowhere.bin", MAKE)),
    "only .idx": Case(on("no_bin"), ("there is no", "no_bin.bin", MAKE)),
    "only .bin": Case(on("no_idx"), ("there is no", "no_idx.idx", MAKE)),
    "with suffix": Case(on("text.bin"), ("text.bin: give the prefix without suffix:",)),
    "truncated .bin": Case(on("short_bin"), ("short_bin.bin is truncated or corrupt: it has 1,000 bytes", MAKE)),
    "truncated .idx": Case(on("short_idx"), ("short_idx.idx is truncated or corrupt: it has 100 bytes", MAKE)),
    "bad magic": Case(on("magic"), ("magic.idx is truncated or corrupt", "header", MAKE)),
    "empty files": Case(on("empty"), ("empty.idx is truncated or corrupt: 0 bytes", MAKE)),
    "too many sequences": Case(on("huge"), ("huge.idx is truncated or corrupt", MAKE)),
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
        ("'half' stands where a weight belongs", WEIGHT),
    ),
    "negative weight": Case(
        lambda user: [*lacking("--data-path")(user), "--data-path", "0.5", user["text"], " -1", user["one"]],
        ("the weight  -1 must be a number of at least 0",),
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
        ("--multiple-validation-sets cannot be used with a test set", "--split"),
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


@pytest.fixture(scope="module")
def used_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


def last_message(output: str) -> str:
    """What is printed from the last error on: the last words."""
    start = output.rfind("pretrain_gpt.py: error: ")
    assert start >= 0, output[-2000:]
    return output[start:]


@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.parametrize("name", ENTRY)
def test_entry(name: str, entry: Entry, user: User, used_port: str) -> None:
    case, before = ENTRY[name], contents(user.folder)
    environment = {key: value or used_port for key, value in (case.environment or {}).items()}
    code, output = entry.run(case.arguments(user), environment, list(case.unset))
    assert code is not None, f"hangs: {output[-2000:]}"
    message = last_message(output)
    assert code == case.code and message.count("\n") <= LINES and len(message) < 1000, message
    for part in case.message:
        assert part in message
    if code == 2:
        assert "Traceback" not in output
    after = contents(user.folder)
    assert {path: after.get(path) for path in before} == before, "a file of the user's has changed"


@pytest.mark.parametrize("arguments", [on("text"), resumed(), two()], ids=["new", "resumed", "two data sets"])
def test_without_the_mistake_it_trains(arguments: Callable[[User], list[str]], entry: Entry, user: User) -> None:
    """The cases fail by what they change."""
    code, output = entry.run([*arguments(user), "--train-iters", "2"], {}, [])
    assert code == 0, output[-2000:]


def test_what_changes_on_the_way_is_no_other_training(entry: Entry, user: User, tmp_path: Path) -> None:
    """Length, micro-batches, intervals and the folders of data and checkpoints; then nothing is left to do."""
    shutil.copytree(user["remoe"], tmp_path / "moved")
    for path in (bin_path, idx_path):
        shutil.copy(path(user.folder / "text"), path(tmp_path / "text"))
    saving = [
        "--load",
        str(tmp_path / "moved"),
        "--save",
        str(tmp_path / "moved"),
        "--data-path",
        str(tmp_path / "text"),
    ]
    others = "--train-iters 4 --lr-decay-iters 2 --micro-batch-size 4 --log-interval 2 --save-interval 3".split()
    arguments = [*base(user), *RELU, *saving, *others, "--eval-interval", "7", "--eval-iters", "1"]
    code, output = entry.run(arguments, {}, [])
    assert code == 0 and "iteration        4/       4" in output and "Nothing to do" not in output, output[-2000:]
    code, output = entry.run(arguments, {}, [])
    assert code == 0 and "validation loss at iteration 4" in output
    last = output.splitlines()[-1]
    assert (
        last.startswith("Nothing to do: the checkpoint in --load")
        and "is of iteration 4, and --train-iters is 4" in last
    )


PYTHON = sys.executable
TRAIN = ["bash", "scripts/train_llama_182m_remoe.sh"]
PREPROCESS = [PYTHON, "tools/preprocess_data.py", "--tokenizer-type", "GPT2BPETokenizer"]
PILE = ["bash", "data_preprocessing.sh"]
# Words between braces are files of the user.
COMMANDS: dict[str, tuple[list[str], dict[str, str], int, tuple[str, ...]]] = {
    "script: empty DATA_DIR": (TRAIN, {"DATA_DIR": "{folder}"}, 2, ("no *_document.bin in DATA_DIR=", MAKE)),
    "script: VOCAB_FILE is a folder": (
        TRAIN,
        {"DATA_PATH": "{text}", "VOCAB_FILE": "{folder}", "MERGE_FILE": "{file}"},
        2,
        ("VOCAB_FILE: there is no", "folder"),
    ),
    "script: OUTPUT_DIR below a file": (
        TRAIN,
        {"DATA_PATH": "{text}", "VOCAB_FILE": "{file}", "MERGE_FILE": "{file}", "OUTPUT_DIR": "{file}/x"},
        2,
        ("OUTPUT_DIR=", "file/x cannot be written"),
    ),
    "script: TP is a word": (TRAIN, {"DATA_PATH": "{text}", "DRY_RUN": "1", "TP": "two"}, 2, ("TP is 'two'", "whole")),
    "script: NNODES is 0": (TRAIN, {"DATA_PATH": "{text}", "DRY_RUN": "1", "NNODES": "0"}, 2, ("NNODES is '0'",)),
    "pile: no INPUT_DIR": (PILE, {"OUTPUT_DIR": "{folder}"}, 2, ("INPUT_DIR",)),
    "pile: missing folder": (PILE, {"INPUT_DIR": "{nowhere}", "OUTPUT_DIR": "{folder}"}, 2, ("INPUT_DIR", "nowhere")),
    "inspect: missing prefix": ([PYTHON, "tools/inspect_data.py", "{nowhere}"], {}, 1, ("there is no", "nowhere.idx")),
    "inspect: a text file": ([PYTHON, "tools/inspect_data.py", "{file}"], {}, 1, ("there is no", "file.idx", "prefix")),
    "inspect: missing vocabulary": (
        [PYTHON, "tools/inspect_data.py", "{text}", "--vocab-file", "{nowhere}", "--merge-file", "{file}"],
        {},
        1,
        ("--vocab-file", "nowhere"),
    ),
    "preprocess: output below a file": (
        [*PREPROCESS, *"--input {file} --output-prefix {file}/x --vocab-file {file} --merge-file {file}".split()],
        {},
        1,
        ("error: --",),
    ),
    "preprocess: no input": (
        [*PREPROCESS, "--input", "{nowhere}", "--output-prefix", "{folder}/x"],
        {},
        1,
        ("error: --",),
    ),
}


@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.parametrize("name", COMMANDS)
def test_command(name: str, user: User) -> None:
    words, environment, code, parts = COMMANDS[name]
    before = contents(user.folder)

    def filled(text: str) -> str:
        for file in ("folder", "file", "text", "nowhere"):
            text = text.replace(f"{{{file}}}", user[file])
        return text

    result = subprocess.run(
        [filled(word) for word in words],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=LIMIT,
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        | {"PYTHON": PYTHON, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        | {key: filled(value) for key, value in environment.items()},
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("\n") <= LINES, result.stderr
    for part in parts:
        assert part in result.stderr
    assert contents(user.folder) == before


@pytest.mark.timeout(120)
def test_script_whose_training_refuses(user: User, tmp_path: Path) -> None:
    """What the entry says on a real start is the last error in the log, below it only torchrun's report."""
    result = subprocess.run(
        [*TRAIN, "1", "--", "--tokenizer-type", "NullTokenizer", "--vocab-size", "257", "--cpu"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        | {"PYTHON": PYTHON, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        | {"DATA_PATH": user["nowhere"], "OUTPUT_DIR": str(tmp_path / "run")},
    )
    assert result.returncode != 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"pretrain_gpt.py: error: --data-path {user['nowhere']}: there is no" in log
    assert "Traceback" not in log.split("pretrain_gpt.py: error: ")[0]
