"""Test the CPU support: what it replaces and leaves alone, the flags it changes, and its collectives."""

import argparse
import os
import types
from pathlib import Path

import pytest
import torch

from megatron.remoe import cpu
from megatron.remoe.cpu.collectives import with_padding
from megatron.remoe.cpu.flags import CPU_VALUES, adapt_arguments
from tests.training_runs import in_another_process

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="an accelerator is in use: the CPU part is inactive")


@pytest.mark.parametrize(("on_this_node", "is_wanted"), [("4", True), ("2", False), ("", False)])
def test_one_of_several_nodes_is_no_fallback(on_this_node: str, is_wanted: bool, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", on_this_node)
    if not on_this_node:  # as without torchrun
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert cpu.is_wanted([]) is is_wanted and cpu.is_wanted(["--cpu"])


def test_torch_stays_what_it_is_outside_megatron() -> None:
    from megatron.core import parallel_state

    assert parallel_state.torch is not torch
    assert parallel_state.torch.cuda.is_available() and not torch.cuda.is_available()
    assert parallel_state.torch.cuda.current_device() == torch.device("cpu")
    assert parallel_state.torch.zeros(2, device="cuda").device.type == "cpu"
    for name in ("matmul", "cat", "nn", "distributed", "Tensor", "float32"):
        assert vars(parallel_state.torch)[name] is getattr(torch, name), "only names that take a device differ"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


def test_denormal_numbers_are_zero() -> None:
    assert not (torch.full((2,), 1e-30) * 1e-10).any()


def test_no_kernels_for_gpus_are_imported(tmp_path: Path) -> None:
    lines = "import sys, megatron.training; print('fla' in sys.modules); import fla; print(fla.__name__)"
    assert in_another_process(lines, tmp_path).split() == ["False", "fla"]


def arguments(**changes: object) -> argparse.Namespace:
    values = {name: value for name, (value, _reason) in CPU_VALUES.items()}
    return argparse.Namespace(**(values | {"rank": 0, "fp16": False, "fp8": None, "fp4": None} | changes))


def test_defaults_change_silently_and_wishes_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(transformer_impl="transformer_engine", distributed_backend="nccl")
    adapt_arguments(args)
    assert (args.transformer_impl, args.distributed_backend) == ("local", "gloo")
    assert capsys.readouterr().err == ""

    args = arguments(moe_grouped_gemm=True)
    adapt_arguments(args)
    assert args.moe_grouped_gemm is False
    assert "without --moe-grouped-gemm (a CUDA kernel of Transformer Engine)" in capsys.readouterr().err

    adapt_arguments(arguments(cpu=False))
    assert f"CUDA {torch.version.cuda}" in capsys.readouterr().err, "nobody asked for the CPU"


def test_no_data_loader_processes_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(num_workers=2)
    adapt_arguments(args)
    assert args.num_workers == 2
    monkeypatch.setattr(os.path, "isdir", lambda path: not path.startswith("/proc"))  # as on macOS
    adapt_arguments(args)
    assert args.num_workers == 0


@pytest.mark.parametrize("name", ["fp16", "fp8", "fp4"])
def test_formats_of_accelerators_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name} needs an accelerator.*--bf16"):
        adapt_arguments(arguments(**{name: True}))


@pytest.mark.parametrize("sizes", [[2, 3], [0, 4], [0, 0]])
def test_unequal_parts_are_gathered_and_scattered(sizes: list[int]) -> None:
    """This is rank 1 of 2; stand-ins return the results of gloo's equal-sized collectives."""
    whole = torch.arange(sum(sizes) * 3.0).view(-1, 3)
    first, second = whole.split(sizes)
    group = types.SimpleNamespace(size=lambda: 2, rank=lambda: 1)

    def gather(mine: torch.Tensor, _group: object, *_others: object) -> torch.Tensor:
        padding = first.new_zeros(len(mine) - len(first), 3)
        return torch.cat([first, padding, mine])

    def reduce_scatter(parts: torch.Tensor, _group: object, *_others: object) -> torch.Tensor:
        return 2 * parts.chunk(2)[1]

    padded_gather, padded_reduce_scatter = with_padding(gather, reduce_scatter)
    assert torch.equal(padded_gather(second, group, sizes), whole)
    assert torch.equal(padded_reduce_scatter(whole, group, sizes), 2 * second)
