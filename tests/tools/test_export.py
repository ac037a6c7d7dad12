"""Test the export of a checkpoint to transformers, the conversion back to a trainable checkpoint, and refusals."""

import argparse
import math
import resource
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron.core.transformer.enums import AttnBackend, InferenceCudaGraphScope
from megatron.remoe.training.gpt2_tokenizer import use_local_gpt2_files
from tests.hf.models import build_megatron, make, megatron_args, tokens
from tests.tiny_model import RELU
from tests.training_runs import TINY, run
from tools.console.errors import ConversionError
from tools.models import checkpoints
from tools.models import export as command
from tools.models.convert.command import main as convert
from tools.models.hf.opening import read_folder
from tools.models.hf.tokenizer import find_training_tokenizer
from tools.models.hf.weights import fill_megatron
from tools.models.measuring import compute_logits
from tools.text.corpora.dataset import byte_level_vocabulary

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]
MIXED = [*TINY, *RELU, *"--moe-layer-freq [0,1] --moe-shared-expert-intermediate-size 32 --eval-iters 0".split()]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a ReMoE with a dense layer and shared experts, with expert parallelism over two processes."""
    folder = tmp_path_factory.mktemp("trained")
    words = f"--expert-model-parallel-size 2 --train-iters 4 --save {folder} --save-interval 2 --no-save-optim".split()
    words.append("--use-distributed-optimizer")
    run([*MIXED, "--data-path", str(data), *words], processes=2)
    return folder


def main(*words: str | Path) -> int:
    return command.main([str(word) for word in words])


def test_exported_folder(trained: Path, tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of two ranks has the same logits in transformers. The folder has tokenizer, λ and model card."""
    there = tmp_path / "folder"
    assert main("--load", trained, "--save", there, "--tokenizer-model", tokenizer) == 0
    output = capfd.readouterr().out
    assert float(output.split("largest difference of logits ")[1].split()[0]) < 1e-5
    assert "on 2,048 random tokens" in output
    model = AutoModelForCausalLM.from_pretrained(there)
    loaded = AutoTokenizer.from_pretrained(there, trust_remote_code=False)
    assert (loaded.padding_side, loaded.pad_token, loaded.eos_token_id) == ("left", "<|endoftext|>", 256)
    made = model.generate(**loaded(["def", "class A"], return_tensors="pt", padding=True), max_new_tokens=5)
    assert made.max() < len(loaded) < model.config.vocab_size
    assert model.config.router_aux_loss_coef == pytest.approx(1e-8 * 1.2**4, rel=1e-9)
    card = (there / "README.md").read_text()
    assert "| tokens trained on | 2,048 |" in card and "| kind | ReMoE |" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]
    assert {path.stat().st_mode & 0o444 for path in there.iterdir()} == {0o444}, "others can read them"


def test_bound_for_servers(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two config fields hold K for servers. Converted back, the model keeps k and K."""
    folder, most = tmp_path / "folder", "--max-experts-per-token"
    assert main("--load", trained, "--save", folder, most, 9) == 1 and "[REMOE-E501]" in capfd.readouterr().err
    assert main("--load", trained, "--ckpt-step", 2, "--save", folder, most, 2) == 0
    config = AutoConfig.from_pretrained(folder)
    assert config.max_experts_per_token == config.num_experts_per_tok == 2 and config.mean_experts_per_token == 1
    assert config.router_aux_loss_coef == pytest.approx(1e-8 * 1.2**2, rel=1e-9)
    assert main("--reverse", "--load", folder, "--save", tmp_path / "back") == 0
    assert " --moe-relu-max-experts 2" in capfd.readouterr().out
    assert checkpoints.find(tmp_path / "back", None).args.moe_router_topk == 1


@pytest.mark.parametrize("name", ["dense", "relu, norms, shared gate", "sigmoid, bias", "hash"])
def test_other_models(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """Models in bf16 keep their logits. Checkpoints name the experts' norm as both layer implementations do."""
    model = make(name, vocab_size=264)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    model.config.dtype = torch.bfloat16
    checkpoints.save(*build_megatron(model), tmp_path / "run")
    stored = checkpoints.find(tmp_path / "run", None).index.state_dict_metadata
    assert all(checkpoints.rename_expert_norm(key) in stored for key in stored if "pre_mlp_layernorm." in key)
    assert main("--load", tmp_path / "run", "--save", tmp_path / "out", "--tokenizer-model", tokenizer) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and loaded.config.tie_word_embeddings == (name == "dense")
    with torch.no_grad():
        logits = read_folder(tmp_path / "out", torch.float32)(tokens()).logits
        torch.testing.assert_close(logits, model(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_settings_of_a_gpu_and_noise() -> None:
    """A model trained on GPUs with noise on the router's input is built for the CPU without noise."""
    model = make("relu")
    on_gpus = {"moe_kernels": "triton", "moe_permute_fusion": True, "fp8": "e4m3"}
    on_gpus |= {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}
    on_gpus |= {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True, "use_te_activation_func": True}
    on_gpus |= {"fp8_param_gather": True, "defer_embedding_wgrad_compute": True, "attention_backend": AttnBackend.flash}
    on_gpus |= {"cuda_graph_impl": "local", "inference_cuda_graph_scope": InferenceCudaGraphScope.layer}
    megatron, _ = build_megatron(model, **on_gpus, moe_input_jitter_eps=0.1)
    torch.testing.assert_close(compute_logits(megatron, tokens()), model(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("setting", "value", "code", "fact"), [
    ("moe_mlp_glu_interleave_size", 4, "E512", "--moe-mlp-glu-interleave-size 4"),
    ("moe_router_score_function", "sqrtsoftplus", "E512", "--moe-router-score-function sqrtsoftplus"),
    ("moe_baseline_router", "top_p", "E512", "--moe-baseline-router top_p"),
    ("moe_router_load_balancing_type", "quantile_balancing", "E512", "--moe-router-load-balancing-type quantile"),
    ("tokenizer_type", "SentencePieceTokenizer", "E513", "--tokenizer-type SentencePieceTokenizer"),
    ("tokenizer_type", "HuggingFaceTokenizer", "E513", "--tokenizer-model /nowhere"),
    ("tokenizer_type", "GPT2BPETokenizer", "E513", "--vocab-file"),
    ("ffn_hidden_size", 44, "E511", "mlp.linear_fc1.weight"),
    ("num_layers", 3, "E511", "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight"),
    (None, None, "E511", "decoder.final_layernorm.weight"),
])  # fmt: skip
def test_refusals(setting: str | None, value: object, code: str, fact: str, tmp_path: Path, capfd) -> None:
    nowhere = dict.fromkeys(("tokenizer_model", "vocab_file", "merge_file"), "/nowhere")
    megatron, args = build_megatron(make("relu, shared"), tokenizer_type="NullTokenizer", **nowhere)
    if setting is None:
        megatron.decoder.final_layernorm.weight.data[3] = float("inf")
    else:
        setattr(args, setting, value)
    if setting == "num_layers":
        args.moe_layer_freq = [0, 1, 1]
    checkpoints.save(megatron, args, tmp_path / "run")
    assert main("--load", tmp_path / "run", "--save", tmp_path / "out") == 1
    errors = capfd.readouterr().err
    assert fact in errors and f"[REMOE-{code}]" in errors and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_files_on_another_machine(names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints record the paths of GPT-2's files. Old ones only name the cache folder and need --tokenizer-model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = zip(byte_level_vocabulary(tmp_path / "files"), names, strict=True)
    paths = [file.rename(file.with_name(name)) for file, name in files]
    config = make("relu", vocab_size=264).config
    args = megatron_args(config, ["--tokenizer-type", "GPT2BPETokenizer"])
    args.vocab_file, args.merge_file = map(str, paths)
    use_local_gpt2_files(args)
    shutil.rmtree(tmp_path / "cache")
    old = argparse.Namespace(**vars(args))
    del old.gpt2_files
    with pytest.raises(ConversionError, match="GPT-2"):
        find_training_tokenizer(old, None, config)
    for saved, given in ((args, None), (old, tmp_path / "files")):
        tokenizer = find_training_tokenizer(saved, given, config)
        assert tokenizer is not None and len(tokenizer) == 257 and tokenizer.decode(tokenizer("é b").input_ids) == "é b"


@pytest.mark.parametrize("scale", [10, math.nan])
def test_models_that_differ_are_not_written(scale: float, tmp_path: Path, monkeypatch, capfd) -> None:
    make("relu").save_pretrained(tmp_path / "folder")
    other = make("relu")
    other.lm_head.weight.data *= scale
    monkeypatch.setattr(command, "fill_megatron", lambda megatron, _: fill_megatron(megatron, other))
    assert main("--reverse", "--load", tmp_path / "folder", "--save", tmp_path / "out") == 1
    assert "[REMOE-E514]" in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_unusable_folders_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make("dense").save_pretrained(tmp_path / "folder")
    for words, code in (
        (["--load", tmp_path, "--save", tmp_path / "out"], "E404"),
        (["--load", tmp_path, "--save", tmp_path / "folder"], "E105"),
        (["--reverse", "--load", tmp_path, "--save", tmp_path / "out"], "E511"),
    ):
        assert main(*words) == 1
        assert f"[REMOE-{code}]" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("limit", [4_000, 60_000])
def test_full_disk_leaves_nothing(limit: int, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """If files cannot grow beyond a limit, as on a full disk, tools print one line and leave nothing behind."""
    make("relu").save_pretrained(tmp_path / "folder")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for tool, words in (
        (command.main, ["--load", trained]),
        (command.main, ["--reverse", "--load", tmp_path / "folder"]),
        (convert, ["--model", "hybrid", "--load", trained]),
    ):
        capfd.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            code = tool([*map(str, words), "--save", str(tmp_path / "out")])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        error = capfd.readouterr().err
        assert code == 1 and "[REMOE-E105]" in error and error.count("\n") == 1, error
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]
