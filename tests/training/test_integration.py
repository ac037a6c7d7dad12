"""The lines of docs/design.md make a ReMoE script of somebody's own Megatron script."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainings import REPOSITORY, TINY, series
from tools.common.tiny_model import RELU

OWN_SCRIPT = """
import torch
from megatron.remoe import cpu
if not torch.cuda.is_available():
    cpu.install()
from megatron.core.enums import ModelType
from megatron.remoe.training.gpt import forward_step, train_valid_test_datasets_provider as datasets_provider
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

model_type = ModelType.encoder_or_decoder

def my_arguments(parser):
    parser.add_argument("--my-own-flag", type=int)
    return parser

{documented_lines}
"""
CPU_FLAGS = (
    "--distributed-backend gloo --transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm "
    "--no-masked-softmax-fusion --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion"
).split()


def documented_lines() -> str:
    found = re.search(
        r"```python\n(from megatron.remoe import.*?)```", (REPOSITORY / "docs/design.md").read_text(), re.S
    )
    assert found
    return found.group(1)


@pytest.mark.parametrize("layers", [[], ["--hybrid-layer-pattern", "*E*E"]], ids=["GPTModel", "HybridModel"])
def test_documented_lines(layers: list[str], data: Path, tmp_path: Path) -> None:
    script = tmp_path / "my_pretrain.py"
    script.write_text(OWN_SCRIPT.format(documented_lines=documented_lines()))
    arguments = [*TINY, *RELU, *layers, "--data-path", str(data), "--my-own-flag", "7"]
    if not torch.cuda.is_available():
        arguments += CPU_FLAGS
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    result = subprocess.run([*launcher, str(script), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(series(result.stdout, "sparsity")) == 8


def test_megatron_stays_a_namespace() -> None:
    assert not (REPOSITORY / "megatron" / "__init__.py").exists()
