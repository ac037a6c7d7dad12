"""Pre-train a language model with Megatron: dense, top-k Mixture-of-Experts or, with --moe-relu-routing, ReMoE.

Accepts Megatron's and ReMoE's flags (see --help). Trains on the CPU with --cpu, or on one node without an accelerator.
"""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from megatron.remoe.training.arguments import ArgumentsProvider
    from megatron.training.models.base import ModelConfig

# Environment of a start without torchrun: this is the only process.
SINGLE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def main(observe: "Callable[[ModelConfig], None] | None" = None) -> None:
    """Train with the command line's flags. On an error, print a message and exit: code 2 for refused settings, else 1.

    Args:
        observe: called with the model's configuration before the model is built, for tools that measure.
    """
    gc.disable()  # collecting garbage during the imports takes an eighth of the time to start
    on_cpu = prepare()
    with exit_on_error(), ExitStack() as exit_stack:
        train(on_cpu, observe, exit_stack)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """On an error, kill the data loader workers, print a message and exit with code 1. Re-raise a KeyboardInterrupt."""
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        # With --exit-signal-handler, data loader workers ignore Python's SIGTERM, and this process would wait for them
        # forever, so kill them. Turn off PyTorch's SIGCHLD handler first: it raises an error when a worker is killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
        from megatron.remoe.start.messages import exit_with_message, newest_save

        if isinstance(error, KeyboardInterrupt):
            if os.environ.get("RANK") == "0" and (words := newest_save()):
                print(f"interrupted: {words}", file=sys.stderr, flush=True)
            raise

        exit_with_message(error)


def prepare() -> bool:
    """Set up the process before Megatron is imported. Return whether it trains on the CPU."""
    from megatron.remoe import cpu
    from megatron.remoe.start import machine, unhelpful_warnings

    if "RANK" not in os.environ:
        os.environ.update(SINGLE_PROCESS)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launch scripts make torchrun ignore it; this is inherited
    if sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) is None:
        # Megatron's data loaders pass a local function to workers. Python 3.14's default, forkserver, cannot pickle it.
        multiprocessing.set_start_method("fork")
    unhelpful_warnings.hide_unhelpful_warnings()
    on_cpu = cpu.is_wanted(sys.argv)
    machine.disable_unavailable(on_cpu)
    if on_cpu:
        cpu.install()
    return on_cpu


def train(on_cpu: bool, observe: "Callable[[ModelConfig], None] | None", exit_stack: ExitStack) -> None:
    """Check the flags, patch Megatron, configure the model, install the routing, and call Megatron's loop.

    Args:
        on_cpu: whether this process trains on the CPU.
        observe: as in `main`.
        exit_stack: holds the lock of --save and the run's log until the caller closes it.
    """
    from megatron.core.enums import ModelType
    from megatron.remoe import patches
    from megatron.remoe.start import unhelpful_warnings
    from megatron.remoe.start.messages import usage_errors
    from megatron.remoe.start.run_lock import check_folders_are_shared
    from megatron.remoe.training.arguments import model_config_from_args
    from megatron.remoe.training.gpt import forward_step, train_valid_test_datasets_provider
    from megatron.remoe.training.local_layers import install_local_layers
    from megatron.remoe.training.routing_hooks import install_routing
    from megatron.remoe.training.run_log import write_run_log
    from megatron.remoe.training.summary import add_summary
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.utils import print_rank_last

    with usage_errors():
        args = checked_arguments(on_cpu, exit_stack)
        patches.apply_patches(saves=bool(args.save))
        model_cfg = model_config_from_args(args)
        install_routing(args, model_cfg)
        install_local_layers(args, model_cfg)
        add_summary(args, model_cfg)
        model_cfg.pre_wrap_hooks.append(lambda chunks: check_folders_are_shared(args, chunks))
        exit_stack.enter_context(write_run_log(args))
    if args.rank == 0 and not args.hybrid_layer_pattern:
        print(unhelpful_warnings.GPT_MODEL, file=sys.stderr, flush=True)

    if observe is not None:
        observe(model_cfg)
    config = pretrain_cfg_container_from_args(args, model_cfg)
    gc.enable()
    pretrain(config, train_valid_test_datasets_provider, ModelType.encoder_or_decoder, forward_step)
    if not args.skip_train and args.iteration >= args.train_iters:
        print_rank_last(
            f"Nothing to do: the checkpoint in --load {args.load} is at iteration {args.iteration}, and --train-iters "
            f"is {args.train_iters}. Nothing was trained; a validation loss above is that of the checkpoint."
        )


def checked_arguments(
    on_cpu: bool, exit_stack: ExitStack, add_flags: "ArgumentsProvider" = lambda parser: parser
) -> "argparse.Namespace":
    """Parse and check the flags, the data and the folders. Return the arguments, which are also Megatron's global ones.

    Args:
        on_cpu, exit_stack: as in `train`.
        add_flags: adds the caller's own flags to the parser, and returns it.

    Raises:
        ValueError, AssertionError, OSError: a flag or a file is wrong; the message names it.
    """
    from megatron.remoe import cpu
    from megatron.remoe.start import checkpoint_files, checks, data, machine, saved_settings
    from megatron.remoe.start.run_lock import lock_save_folder
    from megatron.remoe.training.arguments import load_saved_args, parse_args
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    args = parse_args(lambda parser: cpu.add_cpu_argument(add_flags(parser)))
    if on_cpu:
        cpu.adapt_arguments(args)
    machine.check_kernels(args.moe_kernels, on_cpu)
    exit_stack.enter_context(lock_save_folder(args))
    if (resume := checkpoint_files.choose_checkpoint(args)) is not None:
        resume.apply(args)
    load_saved_args(args, resume)
    checks.check_required_flags(args)
    validate_args(args, {})
    checks.check_settings(args)
    data.check_data(args)
    checks.make_output_folders(args)
    set_global_variables(args)
    args.override_opt_param_scheduler |= saved_settings.check_loaded_run(args, resume)
    data.check_vocabulary(args)
    return args


if __name__ == "__main__":
    main()
