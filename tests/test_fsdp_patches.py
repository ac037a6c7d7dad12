"""Test that Megatron still needs each patch of Megatron-FSDP; a test fails if a release does not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.training import checkpointing
from tests.parity.layouts import FSDP
from tests.test_patches import stock
from tests.tiny_model import RELU
from tests.training_runs import TINY, run, series

UNPATCHED = """
from megatron.remoe import cpu, pretrain
cpu.install()
from megatron.remoe import patches
patches.PATCHES = tuple(patch for patch in patches.PATCHES if patch is not patches.fsdp.scale_once_per_step)
pretrain.main()
"""


def test_megatron_still_lists_no_states_of_parameters_without_rows() -> None:
    parameters = torch.nn.ParameterDict({"here": torch.ones(2, 3), "elsewhere": torch.ones(0, 3)})
    parameters["here"].grad = torch.ones(2, 3)  # Megatron-FSDP sets none for the other one
    adam = torch.optim.AdamW(parameters.values())
    adam.step()
    optimizer = DistributedOptimizer.__new__(DistributedOptimizer)
    optimizer.optimizer, optimizer.is_stub_optimizer = adam, False
    optimizer.ddp_config = SimpleNamespace(use_megatron_fsdp=True)
    parameters.config = SimpleNamespace(num_moe_experts=None)
    optimizer.model_chunks = [parameters]
    listed = optimizer.sharded_param_state_fsdp_dtensor()
    assert listed["state"].keys() == {"here"} and listed["param_to_group_meta"].keys() == {"here", "elsewhere"}


def test_megatron_still_needs_half_precision_to_find_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.ones(4, 2))
    model, fsdp = torch.nn.Module(), torch.nn.Module()
    fsdp.config = SimpleNamespace(num_moe_experts=None)
    model.mlp, fsdp.module = torch.nn.Module(), model
    model.mlp.linear_fc1 = torch.nn.Module()
    model.mlp.linear_fc1.weight = weight
    split = stock(monkeypatch, checkpointing, "handle_swiglu_in_state_dict")
    with pytest.raises(AttributeError, match="no attribute `module`"):
        split(fsdp, {"module.mlp.linear_fc1.weight": weight}, None)


def test_megatron_still_wants_to_copy_loaded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = DistributedOptimizer.__new__(DistributedOptimizer)
    optimizer.ddp_config = SimpleNamespace(use_megatron_fsdp=True)
    optimizer.is_stub_optimizer, optimizer.optimizer = False, None
    with pytest.raises(NotImplementedError):
        stock(monkeypatch, DistributedOptimizer, "_copy_model_params_to_main_params")(optimizer)


@pytest.mark.bulk  # it starts processes; tests/parity shows that the patched run is right
def test_megatron_still_scales_gradients_of_one_rank_again_and_again(data: Path, tmp_path: Path) -> None:
    words = [*TINY, *RELU, "--data-path", str(data), "--expert-model-parallel-size", "2"]
    words += ["--train-iters", "2", "--micro-batch-size", "2", "--global-batch-size", "12"]
    script = tmp_path / "unpatched.py"
    script.write_text(UNPATCHED)
    outputs = [run(words, processes=2), run([*words, *FSDP.split()], processes=2)]
    # In a fork, gloo's threads sometimes corrupt the heap in such reductions over one rank.
    outputs.append(run([*words, *FSDP.split()], processes=2, script=script, fresh=True))
    expected, patched, unpatched = (series(output, "lm loss") for output in outputs)
    assert patched == pytest.approx(expected, rel=1e-5) and unpatched != pytest.approx(expected, rel=1e-4)
