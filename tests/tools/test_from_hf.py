"""Test the import of public models, their export, and further training by the printed command."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, MixtralConfig, OlmoeConfig, PreTrainedModel
from transformers import Qwen3MoeConfig as QwenConfig

from tests.training_runs import run, series
from tools.models import checkpoints
from tools.models.convert.command import main
from tools.models.hf.opening import open_model
from tools.models.hf.settings import complete
from tools.models.megatron_model import build

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]
SIZES = {
    **{"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 2},
}
QWEN = SIZES | {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 32}
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
    "Qwen3-MoE": lambda: QwenConfig(**QWEN, norm_topk_prob=True, mlp_only_layers=[1]),
    "Qwen3-MoE, tied": lambda: QwenConfig(**QWEN, norm_topk_prob=False, tie_word_embeddings=True),
    "DeepSeek-V2-Lite": lambda: DeepseekV2Config(**LATENT),
    "DeepSeek-V2": lambda: DeepseekV2Config(**(LATENT | {"q_lora_rank": 24, "routed_scaling_factor": 1.5})),
    "DeepSeek-V2-Lite, YaRN": lambda: DeepseekV2Config(
        **(LATENT | {"rope_parameters": YARN, "max_position_embeddings": 163840})
    ),
}


def saved_model(name: str, folder: Path) -> PreTrainedModel:
    """Save and return a random model with norms and routers that affect its logits."""
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
def test_logits_of_a_checkpoint_and_its_export(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = saved_model(name, tmp_path / "hf")
    assert main(["--from-hf", str(tmp_path / "hf"), "--save", str(tmp_path / "topk")]) == 0
    assert f"--pretrained-checkpoint {tmp_path / 'topk'} --num-layers 2" in capfd.readouterr().out
    tokens = torch.randint(257, (2, 100))
    expected = model(tokens).logits
    checkpoint = checkpoints.find(tmp_path / "topk", None)
    megatron = build(complete(checkpoint.args))
    checkpoints.load(checkpoint, megatron)
    logits = megatron(tokens, torch.arange(100).expand(2, -1), None)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    if "YaRN" not in name:  # our model for transformers does not support it
        opened = open_model(tmp_path / "topk", needs_tokenizer=False)
        torch.testing.assert_close(opened.model(tokens).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V2-Lite"])
def test_printed_command_trains_on(name: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The printed flags have the folder's precision: bfloat16 for Mixtral, float32 for DeepSeek."""
    model, is_half = saved_model(name, tmp_path / "hf"), name == "Mixtral"
    model.to(torch.bfloat16 if is_half else torch.float32).save_pretrained(tmp_path / "hf")
    words = ["--from-hf", str(tmp_path / "hf"), "--save", str(tmp_path / "topk")]
    assert main([*words, "--tokenizer-model", "/nowhere"]) == 1 and "E513" in capfd.readouterr().err
    assert main(words) == 0
    assert checkpoints.find(tmp_path / "topk", None).args.params_dtype == model.dtype
    command = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("remoe-pretrain"))
    places = {"DATA": str(data), "RUN": str(tmp_path / "run")}
    flags = [places.get(word, word) for word in shlex.split(command)[1:]]
    assert ("--bf16" in flags) == is_half
    more = "--train-iters 1 --global-batch-size 2 --eval-iters 0 --split 90,10,0 --log-interval 1 --cpu".split()
    (loss,) = series(run([*flags, *more]), "lm loss")
    assert loss > math.log(257) + 0.5, "the loss of new weights would be log(257)"


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "a different model": ({"model_type": "llama"}, "E511|'llama'"),
    "groups that do not fit": ({"num_key_value_heads": 3}, "E51"),
    "a window": ({"sliding_window": 64}, "E512|sliding_window 64"),
    "scaled positions": ({"rope_parameters": {**YARN, "rope_type": "linear"}}, "E512|linear"),
    "a different activation": ({"hidden_act": "gelu"}, "E512|hidden_act"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_models(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved_model("Mixtral", tmp_path / "hf")
    fields, expected = FOREIGN[name]
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    capfd.readouterr()
    assert main(["--from-hf", str(tmp_path / "hf"), "--save", str(tmp_path / "topk")]) == 1
    error = capfd.readouterr().err
    assert all(word in error for word in expected.split("|")) and "Traceback" not in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
