"""Test the import of public models, their export, and the training of a ReMoE with fewer experts from a top-k model."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV2Config, MixtralConfig, OlmoeConfig, PreTrainedModel
from transformers import Qwen3MoeConfig as QwenConfig

from tests.trainings import TINY, run, series
from tools.models import checkpoints
from tools.models.convert.command import main
from tools.models.hf.opening import open_model
from tools.models.hf.settings import complete
from tools.models.megatron_model import build

pytestmark = [
    pytest.mark.usefixtures("process_groups"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed"),
    pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning"),
]
SIZES = {
    **{"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 2},
}
LATENT = SIZES | {
    **{"num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 2, "moe_intermediate_size": 48},
    **{"first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 32, "v_head_dim": 16},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8},
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
YARN |= {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
MODELS: dict[str, Callable[[], Any]] = {
    "Mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "OLMoE": lambda: OlmoeConfig(**SIZES, num_experts=4, eos_token_id=None),
    "Qwen3-MoE": lambda: QwenConfig(
        **SIZES, num_experts=4, moe_intermediate_size=48, head_dim=32, norm_topk_prob=True, mlp_only_layers=[1]
    ),
    "Qwen3-MoE, tied": lambda: QwenConfig(
        **SIZES, num_experts=4, moe_intermediate_size=48, head_dim=32, norm_topk_prob=False, tie_word_embeddings=True
    ),
    "DeepSeek-V2-Lite": lambda: DeepseekV2Config(**LATENT),
    "DeepSeek-V2": lambda: DeepseekV2Config(**(LATENT | {"q_lora_rank": 24, "routed_scaling_factor": 1.5})),
    "DeepSeek-V2-Lite, YaRN": lambda: DeepseekV2Config(
        **(LATENT | {"rope_parameters": YARN, "max_position_embeddings": 163840})
    ),
}


def saved_model(name: str, folder: Path) -> PreTrainedModel:
    """Save and return a random model whose norms and routers matter."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        else:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_the_checkpoint_and_of_its_export(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = saved_model(name, tmp_path / "hf")
    assert main(["--from-hf", str(tmp_path / "hf"), "--save", str(tmp_path / "topk")]) == 0
    assert f"--pretrained-checkpoint {tmp_path / 'topk'} --num-layers 2" in capfd.readouterr().out
    tokens = torch.randint(257, (2, 100))
    expected = model(tokens).logits
    checkpoint = checkpoints.find(tmp_path / "topk", None)
    megatron = build(complete(checkpoint.args))
    checkpoints.load(checkpoint, megatron)
    found = megatron(tokens, torch.arange(100).expand(2, -1), None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    if "YaRN" not in name:  # our model for transformers has none
        opened = open_model(tmp_path / "topk", needs_tokenizer=False)
        torch.testing.assert_close(opened.model(tokens).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V2-Lite"])
def test_printed_command_trains_on(name: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved_model(name, tmp_path / "hf")
    capfd.readouterr()
    assert main(["--from-hf", str(tmp_path / "hf"), "--save", str(tmp_path / "topk")]) == 0
    command = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("python pretrain_gpt.py"))
    places = {"DATA": str(data), "RUN": str(tmp_path / "run")}
    flags = [places.get(word, word) for word in shlex.split(command)[2:]]
    more = "--train-iters 1 --global-batch-size 2 --eval-iters 0 --split 90,10,0 --log-interval 1 --cpu".split()
    (loss,) = series(run([*flags, *more]), "lm loss")
    assert loss > math.log(257) + 0.5, "that of these weights; Megatron's initial ones give log(257)"


def fields(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors")

    return rewrite


EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: (folder / "config.json").unlink(), "E511|config.json"),
    "another model": (fields(model_type="llama"), "E511|'llama'"),
    "an exported ReMoE": (fields(model_type="remoe"), "E511|export_hf --reverse"),
    "a field of another type": (fields(hidden_size="wide"), "E511|hidden_size"),
    "fields that do not fit": (fields(num_attention_heads=5), "E512|num_key_value_heads"),
    "groups that do not fit": (fields(num_key_value_heads=3), "E512"),
    "no experts": (fields(num_local_experts=0), "E51"),
    "a window": (fields(sliding_window=64), "E512|sliding_window 64"),
    "scaled positions": (fields(rope_parameters={**YARN, "rope_type": "linear"}), "E512|linear"),
    "another activation": (fields(hidden_act="gelu"), "E512|hidden_act"),
    "a half file": (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678{"), "E511|model.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "E511|model.safetensors"),
    "a tensor too few": (tensors(lambda stored: stored.pop(NORM)), f"E511|{NORM}"),
    "a tensor too many": (tensors(lambda stored: stored.update(more=torch.ones(1))), "E511|more"),
    "another shape": (tensors(lambda stored: stored.update({NORM: torch.ones(65)})), f"E511|{NORM}"),
    "not a number": (tensors(lambda stored: stored[EMBEDDING][3].fill_(torch.nan)), f"E511|{EMBEDDING}"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_and_foreign_folders(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved_model("Mixtral", tmp_path / "hf")
    capfd.readouterr()
    damage, expected = BROKEN[name]
    damage(tmp_path / "hf")
    assert main(["--from-hf", str(tmp_path / "hf"), "--save", str(tmp_path / "topk")]) == 1
    error = capfd.readouterr().err
    assert all(word in error for word in expected.split("|")) and "Traceback" not in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


EXPERTS = "--num-experts 8 --moe-ffn-hidden-size 32 --moe-token-dispatcher-type alltoall".split()
STUDENT = [
    *EXPERTS,
    *"--moe-relu-routing --moe-router-topk 2 --moe-relu-start-topk 4 --moe-relu-start-steps 20".split(),
]
LAMBDA = "--moe-relu-l1-reg-coeff-init 1e-2 --moe-relu-l1-reg-coeff-multiplier 1.05".split()


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train a top-k model (k = 4) and convert it to a ReMoE (k = 2) with so few tokens that its gates are far off."""
    folder = tmp_path_factory.mktemp("models")
    topk = "--moe-router-topk 4 --moe-aux-loss-coeff 1e-2 --train-iters 80 --save-interval 80 --no-save-optim".split()
    run([*TINY, "--data-path", str(data), *EXPERTS, *topk, "--save", str(folder / "topk")])
    words = ["--load", str(folder / "topk"), "--save", str(folder / "remoe"), "--moe-router-topk", "2"]
    assert main([*words, "--tokens", "128", "--loss-bound", "10"]) == 0
    return folder / "topk", folder / "remoe"


def train(data: Path, models: tuple[Path, Path], *more: str, processes: int = 1, expect: int = 0) -> str:
    topk, remoe = models
    words = [*STUDENT, *LAMBDA, "--teacher", str(topk), "--pretrained-checkpoint", str(remoe), *more]
    return run([*TINY, "--data-path", str(data), *words], processes, expect)


def test_towards_the_teacher_with_fewer_experts(data: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    """The divergence falls although the target moves. Resuming keeps both, and refuses another teacher or weight."""
    steps = ["--train-iters", "30", "--lr", "1e-3", "--teacher-weight", "10"]
    folder = str(tmp_path / "run")
    output = train(data, models, *steps, "--save", folder, "--load", folder, "--save-interval", "15")
    targets, divergences = series(output, "target sparsity"), series(output, "teacher kl")
    assert targets == pytest.approx([1 - (4 - 2 * min(step, 20) / 20) / 8 for step in range(30)])
    untaught = series(train(data, models, *steps, "--teacher-weight", "0"), "teacher kl")
    assert sum(divergences[-10:]) < 0.5 * sum(untaught[-10:])
    assert sum(divergences[-5:]) < 0.8 * sum(divergences[1:6])  # the first step has not changed the ReMoE yet
    again = train(data, models, *steps, "--load", folder, "--ckpt-step", "15")
    assert series(again, "target sparsity") == targets[15:]
    # After the save, Megatron prints one mean over other steps.
    assert series(again, "teacher kl")[2:] == divergences[17:]
    for change in (["--teacher-weight", "5"], ["--teacher", str(models[1])]):
        changed = train(data, models, *steps, "--load", folder, "--ckpt-step", "15", *change, expect=2)
        assert "REMOE-E413" in changed and change[0] in changed


def test_towards_a_teacher_with_hash_routing(data: Path, tmp_path: Path) -> None:
    words = [*TINY, *EXPERTS, "--data-path", str(data), "--train-iters", "2"]
    run([*words, "--moe-baseline-router", "hash", "--save", str(tmp_path), "--save-interval", "2"])
    assert len(series(run([*words, "--moe-relu-routing", "--teacher", str(tmp_path)]), "teacher kl")) == 2


def test_teacher_on_two_ranks(data: Path, models: tuple[Path, Path]) -> None:
    # Adam's first step depends on the signs of gradients only. If it were large, rounding would change the routing.
    steps = "--train-iters 2 --global-batch-size 4 --lr 1e-4 --min-lr 1e-4".split()
    alone = train(data, models, *steps)
    layout = "--micro-batch-size 1 --expert-model-parallel-size 2".split()
    shared = train(data, models, *steps, *layout, processes=2)
    assert series(shared, "teacher kl") == pytest.approx(series(alone, "teacher kl"), rel=0.02)
    assert series(shared, "lm loss") == pytest.approx(series(alone, "lm loss"), rel=1e-3)


REFUSED = {
    "another shape": (["--moe-ffn-hidden-size", "64"], "E212|--moe-ffn-hidden-size 32"),
    "no checkpoint": (["--teacher", "/nowhere"], "E404|/nowhere"),
    "a setting": (["--mtp-num-layers", "1"], "E212|--mtp-num-layers 1"),
    "a start without its steps": (["--moe-relu-start-steps", "0"], "E205|--moe-relu-start-steps"),
    "a start above all experts": (["--moe-relu-start-topk", "9"], "E205|--moe-relu-start-topk 9"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_work(name: str, data: Path, models: tuple[Path, Path]) -> None:
    flags, expected = REFUSED[name]
    output = train(data, models, *flags, "--pretrained-checkpoint", "", expect=2)
    assert all(word in output for word in expected.split("|")), output[-1000:]
