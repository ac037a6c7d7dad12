"""Test that tools refuse damaged exported folders in one line, and never run code from a folder."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron.remoe.files.gpt2_files import byte_level_vocabulary
from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tests.hf.models import make
from tools.models.evaluate.command import main as evaluate
from tools.models.export.command import main as export
from tools.models.generate.command import main as generate
from tools.models.hf.tokenizer import generation_config

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]

WEIGHTS, INDEX, NORM = "model.safetensors", "model.safetensors.index.json", "model.norm.weight"
NAN, INFINITY = float("nan"), float("inf")
NUMBERS = (0, -1, NAN, INFINITY, None, "4", 2.5, True, [4], {}, 10**30)
SIZES = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
max_position_embeddings num_experts_per_tok
""".split()
OTHERS: dict[str, tuple[Any, ...]] = {
    "num_experts": (-1, NAN, None, "8", 2.5, 1, 9, 0),
    "moe_intermediate_size": (0, -1, NAN, None, "24", 25),
    "shared_expert_intermediate_size": (-1, NAN, None, "12", 12),
    "shared_expert_gate": (None, 1),
    "qk_norm": ("tails", 1),
    "kv_lora_rank": (0, -1, NAN, "16", 16),
    "rope_interleave": (None, False),
    "rms_norm_eps": (0, -1e-5, NAN, INFINITY, None, "small", [1e-5], 2),
    "rope_parameters": (None, {}, [], "default", 5, {"rope_type": "default"}, {"rope_theta": 500.0}),
    "rope_parameters.rope_theta": (None, 0, -5, NAN, INFINITY, "500"),
    "rope_parameters.rope_type": (None, "yarn", 3),
    "tie_word_embeddings": (None, "no", 1, True),
    "moe_relu_routing": (None, "yes", 0),
    "hash_routing": (None, "yes", True),
    "router_expert_bias": (None, 1, True),
    "mlp_only_layers": (None, "0", 0, [-1], [2], [0], [NAN]),
    "max_experts_per_token": (0, -1, 9, NAN, "2"),
    "scoring_func": (None, "sqrtsoftplus", 1),
    "routed_scaling_factor": (0, NAN, None, "1"),
    "router_aux_loss_coef": (-1, NAN, INFINITY, None, "0"),
    "router_dtype": ("float99", 32),
    "dtype": (None, "int8", "float99", 32),
    "attention_dropout": (-1, 1, NAN, None, "0"),
    "hidden_act": (None, "gelu", 0),
    "attention_bias": (None, True),
    "quantization_config": ({"quant_method": "bitsandbytes"},),
    "model_type": (None, "llama", 0),
    "eos_token_id": (-1, 264, NAN, "end", [264]),
}
FIELDS = [(field, value) for field in SIZES for value in NUMBERS] + [
    (field, value) for field, values in OTHERS.items() for value in values
]
# Valid values that do not fit these weights: the error names the tensors or the field.
OTHER_SHAPES = [(field, value) for field, value in {"vocab_size": 265, "hidden_size": 34, "head_dim": 8}.items()]
OTHER_SHAPES += [("num_hidden_layers", 1), ("num_hidden_layers", 10**9), ("num_experts", 2**30), ("hidden_size", 2**30)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a small ReMoE with its tokenizer, and return the folder."""
    root = tmp_path_factory.mktemp("exported")
    model = make("relu", vocab_size=264)
    model.save_pretrained(root / "model")
    tokenizer = AutoTokenizer.from_pretrained(
        gpt2_tokenizer_folder(*byte_level_vocabulary(root / "files"), cache_dir=root)
    )
    tokenizer.save_pretrained(root / "model")
    generation_config(model.config, tokenizer).save_pretrained(root / "model")
    return root / "model"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


def set_field(folder: Path, field: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    outer, _, inner = field.partition(".")
    config[outer] = config[outer] | {inner: value} if inner else value
    (folder / "config.json").write_text(json.dumps(config))


def open_with_all(folder: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Open the folder with each tool; assert that each fails in one line and asks nothing; return the errors."""
    errors = []
    for tool, words in (
        (generate, ["--prompt", "a"]),
        (evaluate, ["--data-path", "/nowhere"]),
        (export, ["--reverse", "--save", str(folder.parent / "out")]),
    ):
        capfd.readouterr()
        assert tool(["--load", str(folder), *words]) == 1
        output, error = capfd.readouterr()
        assert error.endswith(("[REMOE-E511]\n", "[REMOE-E513]\n")) and error.count("\n") == 1, error
        assert "[y/N]" not in output + error and not (folder.parent / "out").exists()
        errors.append(error)
    return errors


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("num_hidden_layers", 3), ("num_hidden_layers", 0), ("rope_parameters", None), ("num_experts", 4)],
        *[("rope_parameters.rope_theta", None), ("rms_norm_eps", NAN), ("dtype", "float99")],
        *(pytest.param(*case, marks=pytest.mark.bulk) for case in FIELDS + OTHER_SHAPES),
    ],
)
def test_fields(field: str, value: Any, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    set_field(folder, field, value)
    for error in open_with_all(folder, capfd):
        assert field.split(".")[0] in error or re.search(r"\btensors?\b", error.replace(".safetensors", "")), error


@pytest.mark.bulk
@pytest.mark.parametrize("field", [*SIZES, "rms_norm_eps", "rope_parameters", "num_experts", "moe_relu_routing"])
def test_missing_fields(field: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[field]
    (folder / "config.json").write_text(json.dumps(config))
    assert all(field in error for error in open_with_all(folder, capfd))


Tensors = dict[str, torch.Tensor]


def change_tensors(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    def work(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return work


def change_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def shards(weight_map: Any) -> Callable[[Path], object]:
    """Return a function that moves the weights to shard.safetensors and writes an index with this map."""

    def work(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / WEIGHTS), "shard.safetensors")
        (folder / WEIGHTS).rename(folder / "shard.safetensors")
        (folder.parent / "outside.safetensors").write_bytes((folder / "shard.safetensors").read_bytes())
        content = weight_map(names, folder) if callable(weight_map) else weight_map
        (folder / INDEX).write_text(json.dumps({"weight_map": content}))

    return work


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def twice(folder: Path) -> None:
    shards(lambda names, _: names | {"more": "second.safetensors"})(folder)
    save_file({NORM: torch.ones(32)}, folder / "second.safetensors")


def write(name: str, content: bytes | str) -> Callable[[Path], object]:
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def as_folder(name: str) -> Callable[[Path], object]:
    def work(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return work


# Damage to the folder, and a word of the error message.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (change_tensors(lambda one: one.pop("model.layers.1.mlp.experts.down_proj")), "experts.down_proj"),
    "missing layer": (
        change_tensors(lambda one: [one.pop(name) for name in [*one] if ".1." in name]), "num_hidden_layers"
    ),
    "unexpected": (change_tensors(lambda one: one.update(more=torch.ones(3))), "more"),
    "other shape": (change_tensors(lambda one: one.update({NORM: torch.ones(33)})), NORM),
    "not finite": (change_tensors(lambda one: one[NORM].fill_(NAN)), NORM),
    "pickle": (pickled, "pytorch_model.bin"),
    "outside": (shards(lambda names, _: names | {NORM: "../outside.safetensors"}), "../outside.safetensors"),
    "oversized header": (change_bytes(lambda one: (2**40).to_bytes(8, "little") + one[8:]), WEIGHTS),
    "truncated": (change_bytes(lambda one: one[: len(one) // 2]), WEIGHTS),
}  # fmt: skip
MORE_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "all missing": (change_tensors(lambda one: one.clear()), "num_hidden_layers"),
    "infinite": (change_tensors(lambda one: one["lm_head.weight"].view(-1)[5:6].fill_(INFINITY)), "lm_head"),
    "integers": (change_tensors(lambda one: one.update({NORM: torch.ones(32, dtype=torch.int64)})), "I64"),
    "float8": (change_tensors(lambda one: one.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)})), NORM),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "weights are a folder": (as_folder(WEIGHTS), WEIGHTS),
    "dangling link": (lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to("/nowhere")), WEIGHTS),
    "empty": (write(WEIGHTS, b""), WEIGHTS),
    "zeros": (change_bytes(lambda one: bytes(len(one))), WEIGHTS),
    "text": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 238304\n"), WEIGHTS),
    "header of 100 MB": (change_bytes(lambda one: (10**8 + 1).to_bytes(8, "little") + one[8:]), WEIGHTS),
    "header is no JSON": (change_bytes(lambda one: one[:8] + b"[" + one[9:]), WEIGHTS),
    "a byte more": (change_bytes(lambda one: one + b"x"), WEIGHTS),
    "absolute path": (
        shards(lambda names, folder: names | {NORM: str(folder.parent / "outside.safetensors")}), "outside"
    ),
    "index names a pickle": (shards(lambda names, _: names | {NORM: "pytorch_model.bin"}), "pytorch_model.bin"),
    "index names nothing": (shards({}), INDEX),
    "index names a number": (shards(lambda names, _: names | {NORM: 3}), INDEX),
    "index is null": (shards(None), INDEX),
    "index names what is not there": (shards(lambda names, _: names | {NORM: "gone.safetensors"}), "gone.safetensors"),
    "twice": (twice, NORM),
    "index is no JSON": (lambda folder: (shards({})(folder), write(INDEX, "{")(folder)), INDEX),
    "config is cut off": (write("config.json", '{"model_type": "remoe",'), "config.json"),
    "config is a list": (write("config.json", "[]"), "config.json"),
    "config is binary": (write("config.json", b"\xff\xfe\x00"), "config.json"),
    "config is deep": (write("config.json", "[" * 100_000), "config.json"),
    "config has a number of 5000 digits": (write("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), "config.json"),
    "adapter": (write("adapter_config.json", "{}"), "adapter"),
    "tokenizer is empty": (write("tokenizer.json", "{}"), "tokenizer"),
    "tokenizer is binary": (write("tokenizer.json", b"\xff\x00"), "tokenizer"),
    "tokenizer's settings are a list": (write("tokenizer_config.json", "[]"), "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*DAMAGE, *(pytest.param(name, marks=pytest.mark.bulk) for name in MORE_DAMAGE)])
def test_damage(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage, word = (DAMAGE | MORE_DAMAGE)[name]
    damage(folder)
    assert all(word in error for error in open_with_all(folder, capfd))


def test_code_in_the_folder_is_not_run(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code for model, tokenizer and generation is not run, nothing is asked, and broken settings are ignored."""
    for name in ("modeling_remoe.py", "configuration_remoe.py", "tokenization.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")
    set_field(folder, "auto_map", {"AutoConfig": "configuration_remoe.RemoeConfig", "AutoModel": "modeling_remoe.R"})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text("{")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert generate(["--load", str(folder), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert export(["--reverse", "--load", str(folder), "--save", str(folder.parent / "out")]) == 0
    assert sys.stdin.read() == "y\n" and not (folder.parent / "ran").exists()
    output, error = capfd.readouterr()
    assert "[y/N]" not in output + error and "Traceback" not in error
