"""All that is changed in Megatron outside the CPU part: what runs need to start, to resume and to stop in good order.

No public hook reaches any of them. `PATCHES` says of each what it changes, why, and what ends it; a test of each fails
once Megatron no longer needs it.
"""

import importlib
import importlib.metadata
import io
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from importlib.util import find_spec
from multiprocessing.managers import SyncManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron.core.datasets import utils
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.language_module import language_module
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine
from megatron.core.tensor_parallel import layers
from megatron.core.utils import local_multi_tensor_l2_norm
from megatron.remoe.local.cross_entropy import vocab_parallel_cross_entropy
from megatron.remoe.local.rotary import FusedRotaryEmbedding
from megatron.remoe.preflight.checkpoint_files import BrokenCheckpointError
from megatron.training import training

READ_AGAINST = ("0.19.0", "0.19.1", "0.19.2")  # megatron-core, in which all that is changed here is the same


def use_shipped_helpers() -> None:
    """Skip the compilation of the data helpers where there is no Makefile and the compiled ones are there.

    Megatron's start-up runs `make` beside its data sets and ends the process if that fails. A released wheel holds the
    compiled helpers and no Makefile, so that no training starts from it, on a GPU neither.
    """
    if (Path(utils.__file__).parent / "Makefile").exists():
        return
    importlib.import_module("megatron.core.datasets.helpers_cpp")
    utils.compile_helpers = lambda: None


def let_torch_adam_resume() -> None:
    """Let the distributed optimizer go on from a checkpoint where neither Transformer Engine nor apex is installed.

    Before it loads, Megatron reads the number of steps out of the optimizer's state, which PyTorch's Adam does not have
    before its first step. Loading copies into views of fp32 parameters with gradients on, lets all parameters share one
    counter of steps, and then overwrites it with the zero from before; in the fully reshardable format it asks for a
    counter that is not saved.
    """
    state_dict, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(state_dict, "__wrapped__"):
        return

    @wraps(state_dict)
    def state_dict_with_steps(self: DistributedOptimizer) -> Any:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if not state and isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
                    state["step"] = _step(0.0, group, parameter)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state_dict(self)

    @wraps(load_state_dict)
    @torch.no_grad()
    def load_state_dict_with_steps(self: DistributedOptimizer, loaded: Any) -> None:
        load_state_dict(self, loaded)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if "step" in (state := self.optimizer.state[parameter]):
                    state["step"] = _step(group["step"], group, parameter)

    @wraps(set_states)
    def set_states_but_steps(self: DistributedOptimizer, parameter: Any, tensors: dict[str, Any]) -> None:
        set_states(self, parameter, {"step": None} | tensors)  # what is no tensor is left alone

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_steps
    DistributedOptimizer.state_dict = state_dict_with_steps
    DistributedOptimizer.load_state_dict = load_state_dict_with_steps


def _step(number: float, group: dict[str, Any], parameter: torch.Tensor) -> torch.Tensor:
    """PyTorch's counter of steps: where the kernel that takes all of a parameter's state reads it, or on the host."""
    return torch.tensor(float(number), device=parameter.device if group["fused"] or group["capturable"] else "cpu")


def use_fused_adam() -> None:
    """Let PyTorch's Adam, in the distributed optimizer, pass over memory once where no engine brings another.

    Megatron gives PyTorch no choice, and by default it makes a pass for each of about ten operations.
    """
    initialize = DistributedOptimizer.__init__
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(initialize, "__wrapped__"):
        return

    @wraps(initialize)
    def initialize_fused(self: DistributedOptimizer, *arguments: Any, **options: Any) -> None:
        initialize(self, *arguments, **options)
        if isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
            for group in self.optimizer.param_groups:
                group["fused"] = True

    DistributedOptimizer.__init__ = initialize_fused


def keep_norms_on_the_device() -> None:
    """Wait once for the gradients' norm on a GPU where neither Transformer Engine nor apex is installed.

    Megatron puts the norms of all tensors into one tensor on the host, for which it waits once a tensor. On the CPU
    its own function goes on, whose digits do not change.
    """
    stock = clip_grads.l2_norm_impl
    if stock is not local_multi_tensor_l2_norm:
        return

    @wraps(stock)
    def norm(chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], *rest: Any) -> Any:
        tensors = [tensor for tensors in tensor_lists for tensor in tensors]
        if all(tensor.is_cuda for tensor in tensors):
            return _norm_of_all(tensors), None
        return stock(chunk_size, noop_flag, tensor_lists, *rest)

    clip_grads.l2_norm_impl = norm


def _norm_of_all(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The L2 norm of tensors on one device, fp32 `[1]` there."""
    return torch.nn.utils.get_total_norm(tensors).to(torch.float32).reshape(1)


def validate_once_a_step() -> None:
    """Wait once a step for the losses and gradients that Megatron validates on a GPU: it waits twice a bucket.

    Whether one is NaN or infinite stays on the device until the last backward pass is through. If one is, all are
    validated as Megatron does, in their order and before the optimizer's step.
    """
    validate, run_again = RerunStateMachine.validate_result, RerunStateMachine.should_run_forward_backward
    if hasattr(validate, "__wrapped__"):
        return
    waiting: list[tuple[torch.Tensor, Callable[[], None]]] = []

    @wraps(validate)
    def validate_later(self: RerunStateMachine, result: Any, rejection_func: Any, *rest: Any, **options: Any) -> None:
        waits = self.state == RerunState.INITIAL_RUN and self.mode != RerunMode.REPORT_DETERMINISM_STATS
        if not waits or rejection_func not in (torch.isnan, torch.isinf) or self.error_injector.should_inject_errors:
            return validate(self, result, rejection_func, *rest, **options)
        result = result.detach()
        waiting.append((rejection_func(result), partial(validate, self, result, rejection_func, *rest, **options)))

    @wraps(run_again)
    def run_again_if_rejected(self: RerunStateMachine, data_iterator: Any) -> bool:
        results, waiting[:] = waiting[:], []
        if results and torch.stack([is_rejected for is_rejected, _ in results]).any():
            for _, validate_now in results:
                validate_now()
        return run_again(self, data_iterator)

    RerunStateMachine.validate_result = validate_later
    RerunStateMachine.should_run_forward_backward = run_again_if_rejected


def ask_no_other_rank_if_alone() -> None:
    """Let a rank that has the whole model take its own word for the gradients' norm and that of the update.

    Megatron asks a group of one by way of the device, and waits for it five times a step.
    """
    for name in ("reduce_max_stat_across_model_parallel_group", "logical_and_across_model_parallel_group"):
        stock = getattr(training, name)
        if not hasattr(stock, "__wrapped__"):
            setattr(training, name, _asked_if_not_alone(stock))


def _asked_if_not_alone(stock: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)
    def ask(value: Any, group: torch.distributed.ProcessGroup | None = None) -> Any:
        return value if group is not None and group.size() == 1 else stock(value, group)

    return ask


def add_weight_gradients_by_torch() -> None:
    """Let Megatron's linear layers add their weight gradients to the fp32 ones where apex is not installed.

    It refuses --gradient-accumulation-fusion without apex's module, which calls a product of cuBLAS that torch has too.
    """
    if layers._grad_accum_fusion_available:
        return
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=_add_weight_gradient, wgrad_gemm_accum_fp16=_add_weight_gradient
    )
    layers._grad_accum_fusion_available = True


def _add_weight_gradient(rows: torch.Tensor, gradient: torch.Tensor, main_grad: torch.Tensor) -> None:
    """`main_grad += gradient.T @ rows`: `[rows, in]`, `[rows, out]` → `[out, in]`, in the type of `main_grad`."""
    if rows.dtype == main_grad.dtype:
        main_grad.addmm_(gradient.t(), rows)
    else:
        torch.addmm(main_grad, gradient.t(), rows, out_dtype=main_grad.dtype, out=main_grad)


def fuse_cross_entropy_without_compiler() -> None:
    """Let --cross-entropy-loss-fusion take flash-linear-attention's kernels, where that package is installed.

    Megatron's own is for torch.compile, in pieces: they keep the softmax in fp32, and give any model bf16 gradients.
    """
    if find_spec("fla") is not None:
        language_module.fused_vocab_parallel_cross_entropy = vocab_parallel_cross_entropy


def fuse_rotary_embedding_without_engine() -> None:
    """Let Megatron's rope fusion take flash-linear-attention's kernel where Transformer Engine is not installed."""
    if rope_utils.fused_apply_rotary_pos_emb is None and find_spec("fla") is not None:
        rope_utils.fused_apply_rotary_pos_emb = FusedRotaryEmbedding()


def count_operations_of_warmup() -> None:
    """Count a step of a near-dense warm-up by its own k, in throughput and in the total that checkpoints keep."""
    count = training.num_floating_point_operations
    if hasattr(count, "__wrapped__"):
        return

    @wraps(count)
    def count_by_step(args: Any, *rest: Any, **options: Any) -> Any:
        if getattr(args, "moe_warmup_topk", None) and args.curr_iteration < args.moe_warmup_steps:
            args = SimpleNamespace(**vars(args) | {"moe_router_topk": args.moe_warmup_topk})
        return count(args, *rest, **options)

    training.num_floating_point_operations = count_by_step


def load_objects_unexecuted() -> None:
    """Refuse what could run code among a checkpoint's objects, such as the states of random number generators.

    PyTorch unpickles them without restriction, though Megatron has a list of what they consist of.
    """
    load_bytes = MCoreLoadPlanner.load_bytes
    if hasattr(load_bytes, "__wrapped__"):
        return

    @wraps(load_bytes)
    def load_known_bytes(self: MCoreLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
        name = f"{read_item.dest_index.fqn} in the checkpoint"
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(value)
            value.seek(0)
            if not unknown:
                torch.load(value, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever reading a damaged object raises
            raise BrokenCheckpointError(f"{name} is damaged. Give an earlier iteration with --ckpt-step.") from error
        if unknown:
            raise BrokenCheckpointError(
                f"{name} refers to {', '.join(unknown)}, which no state of a training consists of and could run code. "
                "Nothing of it was executed. Give a checkpoint that you trust."
            )
        value.seek(0)
        load_bytes(self, read_item, value)

    MCoreLoadPlanner.load_bytes = load_known_bytes


def keep_saving_possible() -> None:
    """Start the process that holds Megatron's queue of written shards, such that it outlives SIGTERM.

    Every save needs it. Megatron starts it at the first one, and SIGTERM ends it; Slurm sends SIGTERM to all processes
    of a step, so that the save which --exit-signal-handler then makes would fail. Forked here it also starts at once;
    Megatron spawns it, which imports everything anew. It ends with its parent: it would keep the log's pipe open.
    """
    if filesystem_async._results_queue is not None:
        return
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_serve_until_the_parent_ends)
    filesystem_async._results_queue = manager.Queue()


def tell_why_writing_fails() -> None:
    """Keep file and reason where part of a checkpoint cannot be written: Megatron keeps only the type of the error."""
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
    if getattr(write, "tells_why", False):
        return

    @wraps(write)
    def write_or_tell(*arguments: Any, **options: Any) -> Any:
        output = write(*arguments, **options)
        error = output[1]
        if not isinstance(error, Exception) or options["results_queue"] is not None:
            return output  # written, or in a thread of Megatron's that has to come to its end
        while not isinstance(error, OSError) and error.__context__ is not None:
            error = error.__context__  # PyTorch's own complaint about the file that it could not go on with
        raise RuntimeError(f"{options['write_bucket'][0]}: {error}") from error

    write_or_tell.tells_why = True  # type: ignore[attr-defined]
    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(write_or_tell)


def _serve_until_the_parent_ends() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@dataclass(frozen=True)
class Patch:
    """One change of Megatron.

    Attributes:
        apply: makes it; once or more often.
        changes: file and function of Megatron.
        lacks: what a user has to do without where it is not applied.
        ends: what tells that it is no longer needed.
        for_saving: whether only trainings that save need it.
    """

    apply: Callable[[], None]
    changes: str
    lacks: str
    ends: str
    for_saving: bool = False


PATCHES = (
    Patch(
        use_shipped_helpers,
        "core/datasets/utils.py: compile_helpers",
        "a start without Megatron's Makefile, which the wheel does not hold",
        "compile_helpers takes the compiled helpers, or the wheel holds the Makefile",
    ),
    Patch(
        let_torch_adam_resume,
        "core/optimizer/distrib_optimizer.py: DistributedOptimizer's state_dict, load_state_dict and "
        "_set_main_param_and_optimizer_states",
        "resuming the distributed optimizer without Transformer Engine or apex",
        "a distributed torch.optim.AdamW resumes",
    ),
    Patch(
        use_fused_adam,
        "core/optimizer/distrib_optimizer.py: DistributedOptimizer.__init__",
        "an Adam that passes over memory once, on GPUs without Transformer Engine or apex",
        "Megatron asks PyTorch's Adam to be fused",
    ),
    Patch(
        keep_norms_on_the_device,
        "core/optimizer/clip_grads.py: l2_norm_impl",
        "a gradient norm without a wait a tensor, on GPUs without Transformer Engine or apex",
        "local_multi_tensor_l2_norm in core/utils.py asks for no value on the host",
    ),
    Patch(
        validate_once_a_step,
        "core/rerun_state_machine.py: RerunStateMachine's validate_result and should_run_forward_backward",
        "one wait a step for losses and gradients that are not finite, instead of two for each of them",
        "validate_result asks for no value on the host",
    ),
    Patch(
        ask_no_other_rank_if_alone,
        "training/training.py: reduce_max_stat_across_model_parallel_group, logical_and_across_model_parallel_group",
        "a step without five waits for a model parallel group of one rank",
        "both return at once in a group of one rank",
    ),
    Patch(
        add_weight_gradients_by_torch,
        "core/tensor_parallel/layers.py: fused_weight_gradient_mlp_cuda",
        "weight gradients that are added to the fp32 ones by the product itself, on GPUs without apex",
        "linear layers accumulate weight gradients without apex's module",
    ),
    Patch(
        fuse_cross_entropy_without_compiler,
        "core/models/common/language_module/language_module.py: fused_vocab_parallel_cross_entropy",
        "a cross entropy in one pass forward and one backward, without Transformer Engine",
        "the native fusion reads bf16 logits once forward and once backward",
    ),
    Patch(
        fuse_rotary_embedding_without_engine,
        "core/models/common/embeddings/rope_utils.py: fused_apply_rotary_pos_emb",
        "rotary embedding in one kernel, without Transformer Engine",
        "rope fusion takes a kernel that needs no Transformer Engine",
    ),
    Patch(
        count_operations_of_warmup,
        "training/training.py: num_floating_point_operations",
        "the floating-point operations of --moe-warmup-topk's steps",
        "the count is told the experts per token of a step",
    ),
    Patch(
        load_objects_unexecuted,
        "core/dist_checkpointing/strategies/torch.py: MCoreLoadPlanner.load_bytes",
        "protection from code in a checkpoint's objects",
        "load_bytes unpickles with weights_only=True",
    ),
    Patch(
        keep_saving_possible,
        "core/dist_checkpointing/strategies/filesystem_async.py: _results_queue",
        "the checkpoint that is saved at SIGTERM where the signal goes to all processes, as Slurm's does",
        "the queue's process ignores SIGTERM, or there is none",
        for_saving=True,
    ),
    Patch(
        tell_why_writing_fails,
        "core/dist_checkpointing/strategies/filesystem_async.py: FileSystemWriterAsync.write_preloaded_data",
        "the file and the reason where a checkpoint cannot be written",
        "the error of a failed write reaches the caller whole",
        for_saving=True,
    ),
)


def apply_patches(saves: bool = True) -> None:
    """Make the changes; with a version of Megatron that they were not read against none, and warn of what is lacking.

    Args:
        saves: whether checkpoints will be written.
    """
    patches = [patch for patch in PATCHES if saves or not patch.for_saving]
    version = importlib.metadata.version("megatron-core")
    if version in READ_AGAINST:
        for patch in patches:
            patch.apply()
    elif os.environ.get("RANK", "0") == "0":
        lacking = "".join(f"\n- {patch.lacks} ({patch.changes})" for patch in patches)
        warnings.warn(
            f"megatron-core {version}: the changes that are made in Megatron otherwise were read against "
            f"{', '.join(READ_AGAINST)} and are left out. You do without:{lacking}",
            stacklevel=2,
        )
