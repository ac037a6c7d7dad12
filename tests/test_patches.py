"""Test that Megatron still needs each patch; a test fails if a release does not."""

import copy
import importlib.metadata
import importlib.util
import inspect
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.core import optimizer as core_optimizer
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer, MegatronOptimizer
from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine
from megatron.core.tensor_parallel import ColumnParallelLinear, layers
from megatron.core.utils import local_multi_tensor_l2_norm
from megatron.remoe import patches
from megatron.remoe.files.errors import UsageError
from megatron.remoe.patches import fusions, log_lines
from megatron.remoe.patches import optimizer as adam_patches
from megatron.remoe.patches.patch import hash_source
from megatron.remoe.patches.patch import replace as replace_once
from megatron.training import training
from tests.layers import make_topk_config
from tests.training_runs import in_another_process


def stock(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Any:
    """Restore Megatron's own function until the end of the test, and return it."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, getattr(function, "__wrapped__", function))
    return getattr(owner, name)


def test_each_function_is_replaced_once() -> None:
    def negate(stock: Any, value: int) -> int:
        return -int(stock(value))

    counted = SimpleNamespace(function=lambda value: value)
    for _ in range(2):
        replace_once(counted, "function")(lambda stock, value: stock(value) + 1)
        replace_once(counted, "function")(negate)
    assert counted.function(1) == -2


def test_sources_are_those_that_the_patches_change() -> None:
    assert importlib.metadata.version("megatron-core") == patches.TESTED
    for patch in patches.PATCHES:
        assert patch.changes and patch.provides and patch.ends and patch.find_changed() == []
    assert hash_source("core.no_such_module:function") == hash_source("core.utils:no_such_function") == ""


def test_changed_source(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """A needed patch stops the program, a different one is left out with a warning."""
    applied: list[str] = []
    monkeypatch.delenv("REMOE_TRY_MEGATRON", raising=False)
    needed, spare, saving = (
        replace(
            patches.PATCHES[0], apply=partial(applied.append, name), provides=name, is_needed=name != "spare",
            for_saving=name == "saving",
        )
        for name in ("needed", "spare", "saving")
    )  # fmt: skip
    changed = dict.fromkeys(spare.changes, "00000000")
    monkeypatch.setattr(patches, "PATCHES", [needed, replace(spare, changes=changed), saving])
    patches.apply_patches()
    assert applied == ["needed", "saving"] and "spare" in str(recwarn.pop(UserWarning).message)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(patches, "PATCHES", [replace(spare, changes=changed), replace(saving, changes=changed)])
    patches.apply_patches(saves=False)
    assert not recwarn, "one warning, not one for each rank"
    with pytest.raises(UsageError, match="saving") as stop:
        patches.apply_patches()
    assert stop.value.code == "REMOE-E104" and "spare" not in str(stop.value)
    monkeypatch.setenv("REMOE_TRY_MEGATRON", "1")
    patches.apply_patches()
    assert applied == ["needed", "saving", "spare", "saving"]


def test_megatron_still_compiles_its_helpers(tmp_path: Path) -> None:
    """Megatron ends the process if there is no Makefile. With the patch the process continues."""
    lines = "from megatron.core.datasets import utils\nutils.compile_helpers()\nprint('goes on')"
    assert "goes on" not in in_another_process(lines, tmp_path, expect=1)
    lines = "from megatron.core.datasets import utils\nfrom megatron.remoe import patches\n"
    lines += "patches.start.use_shipped_helpers()\nutils.compile_helpers()\nprint('goes on')"
    assert "goes on" in in_another_process(lines, tmp_path)


def test_megatron_still_reads_steps_that_adam_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's Adam has no state before the first step, but resuming needs it."""
    parameter = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.AdamW([parameter])
    optimizer = DistributedOptimizer.__new__(DistributedOptimizer)
    optimizer.optimizer, optimizer.grad_scaler, optimizer.is_stub_optimizer = adam, None, False
    with pytest.raises(AssertionError):
        stock(monkeypatch, DistributedOptimizer, "state_dict")(optimizer)


def test_megatron_still_needs_a_step_of_each_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without experts saves no step count of their optimizer."""
    config = core_optimizer.OptimizerConfig(optimizer="adam", lr=1e-3)
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    adams = [torch.optim.AdamW([parameter]) for parameter in parameters]
    states: dict[int, Any] = {}
    for number, (parameter, adam) in enumerate(zip(parameters, adams, strict=True)):
        parameter.grad = torch.ones(2)
        adam.step()
        states[number] = adam.state_dict()
        states[number]["state"][0].pop("step")
    states[0]["state"]["common_step"] = 5
    chain = ChainedOptimizer([FP32Optimizer(adam, config, lambda *_: None) for adam in adams])
    with pytest.raises(KeyError, match="step"):
        stock(monkeypatch, ChainedOptimizer, "load_state_dict")(chain, copy.deepcopy(states))
    patches.optimizer.share_optimizer_steps()
    chain.load_state_dict(states)
    assert [adam.state[parameter]["step"] for parameter, adam in zip(parameters, adams, strict=True)] == [5, 5]


def test_megatron_still_finds_parameters_beyond_its_tensors() -> None:
    saving = inspect.getsource(inspect.unwrap(DistributedOptimizer.sharded_param_state_fully_reshardable))
    assert "assert param_world_end > buffer.numel_unpadded" in saving, "then it warns of corrupted data"


def test_megatron_still_leaves_adam_to_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    config = core_optimizer.OptimizerConfig(optimizer="adam", lr=1e-3)
    build = partial(core_optimizer._get_megatron_optimizer_based_on_param_groups, config, [])
    adam, _ = build([{"params": [parameter]}], skip_megatron_wrapping=True)
    assert not adam.param_groups[0]["fused"]

    monkeypatch.setattr(MegatronOptimizer, "__init__", MegatronOptimizer.__init__)
    patches.optimizer.use_fused_adam()
    assert FP32Optimizer(adam, config, lambda *_: None).optimizer.param_groups[0]["fused"]
    on_device = torch.nn.Parameter(torch.empty(2, device="meta"))
    steps = [adam_patches._step(3, {"fused": fused, "capturable": False}, on_device) for fused in (False, True)]
    assert [step.device.type for step in steps] == ["cpu", "meta"], "where the kernel looks for it"


def test_megatron_still_waits_for_each_gradients_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors have no values, so reading one raises an error."""
    shapes = [(3, 4), (5,), (2, 2)]
    without_values = [torch.empty(shape, device="meta") for shape in shapes]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        local_multi_tensor_l2_norm(0, None, [without_values], False)

    class OnGPU(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    patches.waits.keep_norms_on_device()
    patched = clip_grads.l2_norm_impl
    assert patched(0, None, [[tensor.as_subclass(OnGPU) for tensor in without_values]], False)[0].shape == (1,)
    torch.manual_seed(1)
    tensors = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    actual = patched(0, None, [[tensor.as_subclass(OnGPU) for tensor in tensors]], False)[0]
    assert actual.dtype == torch.float32 and actual.shape == (1,)
    expected = torch.cat([tensor.flatten() for tensor in tensors]).float().norm()
    torch.testing.assert_close(actual.as_subclass(torch.Tensor)[0], expected, rtol=1e-2, atol=0)
    on_cpu = patched(0, None, [tensors], False)[0]
    assert torch.equal(on_cpu, local_multi_tensor_l2_norm(0, None, [tensors], False)[0]), "to the last digit"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> RerunStateMachine:
    """Return Megatron's unpatched machine after its first step."""
    for name in ("validate_result", "should_run_forward_backward"):
        stock(monkeypatch, RerunStateMachine, name)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(RerunStateMachine, "_reduce_any", lambda _self, value: value)
    machine = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS)
    machine.first_iteration_complete = True
    return machine


def step(machine: RerunStateMachine, *losses: torch.Tensor) -> list[str]:
    """Validate the losses of one step. Return the machine's reaction to each loss, and the result that it rejected."""
    events = []
    assert machine.should_run_forward_backward(None)
    for loss in losses:
        for rejection in (torch.isnan, torch.isinf):
            machine.validate_result(loss, rejection, f"{rejection.__name__} of {len(losses)}")
        events.append("asks for a rerun" if machine.rerun_requested else "goes on")
    machine.should_run_forward_backward(None)
    return [*events, f"{machine.failed_validation_call.caller.message}, its {machine.failed_validation_call.sequence}."]


def test_megatron_still_waits_for_each_result(machine: RerunStateMachine) -> None:
    losses = [torch.tensor(value) for value in (1.0, float("inf"), 1.0)]
    assert step(machine, *losses) == ["goes on", "asks for a rerun", "asks for a rerun", "isinf of 3, its 2."]


def test_results_are_validated_once_a_step(machine: RerunStateMachine) -> None:
    patches.waits.validate_once_per_step()
    # A meta tensor has no value, so reading it before the last backward pass would fail.
    machine.should_run_forward_backward(None)
    with torch.device("meta"):
        machine.validate_result(torch.empty(()), torch.isnan, "nothing")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        machine.should_run_forward_backward(None)
    machine.state = RerunState.NOT_RUNNING_YET
    losses = [torch.tensor(value) for value in (1.0, float("inf"), 1.0)]
    assert step(machine, *losses) == ["goes on", "goes on", "goes on", "isinf of 3, its 2."]
    assert machine.state == RerunState.RERUNNING_IN_PLACE
    # The rerun has the same results, so Megatron's own diagnosis asks for a checkpoint.
    for rejection in (torch.isnan, torch.isinf):
        machine.validate_result(losses[0], rejection, f"{rejection.__name__} of 3")
    machine.validate_result(losses[1], torch.isinf, "isinf of 3")
    assert machine.checkpoint_requested


def test_without_reruns_a_step_that_is_not_finite_ends_before_the_update(machine: RerunStateMachine) -> None:
    machine.set_mode(RerunMode.DISABLED)
    patches.waits.validate_once_per_step()
    machine.should_run_forward_backward(None)
    machine.validate_result(torch.tensor(float("nan")), torch.isnan, "found NaN in a loss")
    with pytest.raises(RuntimeError, match="found NaN in a loss"):
        machine.should_run_forward_backward(None)


@pytest.mark.skipif(importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None, reason="apex is installed")
def test_megatron_still_adds_no_weight_gradients_without_apex(process_groups: None, monkeypatch) -> None:
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    config = make_topk_config(params_dtype=torch.float32, gradient_accumulation_fusion=True)
    linear = partial(ColumnParallelLinear, 6, 4, config=config, init_method=torch.nn.init.normal_, bias=False)
    with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
        linear()
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    patches.fusions.enable_torch_weight_gradient_fusion()
    layer = linear()
    layer.weight.main_grad = torch.ones_like(layer.weight)
    rows = torch.randn(5, 2, 6, device=layer.weight.device)
    for _ in range(2):
        layer(rows)[0].square().sum().backward()
    assert layer.weight.grad is None
    weight = layer.weight.detach().double().requires_grad_()
    (rows.double() @ weight.T).square().sum().backward()
    torch.testing.assert_close(layer.weight.main_grad.double(), 1 + 2 * weight.grad, rtol=1e-5, atol=1e-5)
    # Only GPUs have the product of bf16 rows into fp32. On the meta device PyTorch only checks its arguments.
    with torch.device("cuda" if torch.cuda.is_available() else "meta"):
        half, main_grad = torch.randn(5, 6).bfloat16(), torch.ones(4, 6)
        fusions.add_outer(half, half[:, :4], main_grad)
    if torch.cuda.is_available():
        torch.testing.assert_close(main_grad, 1 + half[:, :4].T.float() @ half.float())


def test_megatron_still_keeps_the_softmax_in_fp32(process_groups: None) -> None:
    """Megatron's fused cross entropy also assumes that all logits are bf16."""
    logits = torch.randn(3, 2, 16, dtype=torch.float16, requires_grad=True)
    losses = fused_vocab_parallel_cross_entropy(logits, torch.zeros(3, 2).long(), torch.distributed.group.WORLD)
    softmax = losses.grad_fn.saved_tensors[0]
    assert softmax.dtype == torch.float32 and softmax.shape == logits.shape


def test_megatron_still_logs_only_to_the_console(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name in ("training_log", "evaluate_and_print_results", "save_checkpoint"):
        stock(monkeypatch, training, name)
    args = SimpleNamespace(
        multiple_validation_sets=False, validation_set_names=None, full_validation=False, eval_iters=3,
        eval_global_batch_size=2, seq_length=5,
    )  # fmt: skip
    for module in (training, log_lines):
        monkeypatch.setattr(module, "get_args", lambda: args)
    losses = {"lm loss": torch.tensor(2.0)}
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: (losses, None, False))
    heard: list[dict[str, object]] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.msg)  # type: ignore[method-assign,assignment,arg-type]
    logger = log_lines.run_logger()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        assert training.evaluate_and_print_results("iteration 7 on test set", None, None, [], 7, None, None) is None
        log_lines.forward_figures()
        log_lines.forward_figures()
        training.evaluate_and_print_results("iteration 7 on test set", None, None, [], 7, None, None)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    expected = {"kind": "validation", "iteration": 7, "set": "test", "final": True, "lm_loss": 2.0, "tokens": 30}
    assert heard == [expected], "once, by the patch"
    assert capsys.readouterr().out.count("validation loss at iteration 7 on test set | lm loss value: 2.0") == 2
