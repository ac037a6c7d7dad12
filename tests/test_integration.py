"""The three lines of docs/design.md make a ReMoE script of somebody's own Megatron script."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainings import RELU, REPOSITORY, TINY, series

OWN_SCRIPT = """
import torch
from megatron.remoe import cpu
if not torch.cuda.is_available():
    cpu.install()
from megatron.core.enums import ModelType
from megatron.remoe.training.gpt import forward_step, train_valid_test_datasets_provider as datasets_provider
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

model_type = ModelType.encoder_or_decoder

def my_arguments(parser):
    parser.add_argument("--my-own-flag", type=int)
    return parser

{three_lines}
"""
CPU_FLAGS = (
    "--distributed-backend gloo --transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm "
    "--no-masked-softmax-fusion --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion"
).split()


def documented_lines() -> str:
    found = re.search(
        r"```python\n(from megatron.remoe.training import.*?)```", (REPOSITORY / "docs/design.md").read_text(), re.S
    )
    assert found
    return found.group(1)


def test_three_lines(data: Path, tmp_path: Path) -> None:
    script = tmp_path / "my_pretrain.py"
    script.write_text(OWN_SCRIPT.format(three_lines=documented_lines()))
    arguments = [*TINY, *RELU, "--data-path", str(data), "--my-own-flag", "7"]
    if not torch.cuda.is_available():
        arguments += CPU_FLAGS
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    result = subprocess.run([*launcher, str(script), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(series(result.stdout, "sparsity")) == 8


def imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, two levels for megatron."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {".".join(name.split(".")[: 2 if name.startswith("megatron") else 1]) for name in names}
    return found


LIBRARY = ["attention", "compatibility", "config", "controller", "conversion", "dispatcher", "experts"]
LIBRARY += ["grouped_swiglu", "layer_specs", "moe_layer", "norm", "router"]


@pytest.mark.parametrize("name", LIBRARY)
def test_library_imports_torch_and_megatron_core_only(name: str) -> None:
    allowed = {"torch", "megatron.core", "megatron.remoe"} | set(sys.stdlib_module_names)
    path = REPOSITORY / "megatron" / "remoe" / f"{name}.py"
    assert imports(path) <= allowed
    assert "megatron.remoe.training" not in path.read_text()


def test_only_the_entry_imports_the_cpu_part() -> None:
    for path in (REPOSITORY / "megatron" / "remoe").rglob("*.py"):
        if path.parent.name != "cpu":
            assert "megatron.remoe.cpu" not in path.read_text(), path
    assert not (REPOSITORY / "megatron" / "__init__.py").exists()
