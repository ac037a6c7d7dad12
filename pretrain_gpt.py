"""Pre-train a GPT model with Megatron: dense, top-k Mixture-of-Experts or, with --moe-relu-routing, ReMoE.

Takes Megatron's flags and those of ReMoE (see --help). Without an accelerator it trains on the CPU.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

from megatron.remoe import console, cpu

# Started without torchrun, this is the only process.
SINGLE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
if "RANK" not in os.environ:
    os.environ.update(SINGLE_PROCESS)

signal.signal(signal.SIGTERM, signal.SIG_DFL)  # scripts/lib/launch.sh has torchrun ignore it, and so would this process
console.hide_unhelpful_warnings()
ON_CPU = cpu.is_wanted(sys.argv)
if ON_CPU:
    cpu.install()

from megatron.core.enums import ModelType  # noqa: E402
from megatron.remoe.training import (  # noqa: E402
    install_local_layers,
    install_relu_routing,
    parse_and_validate_args,
    transformer_config_from_args,
    usage_errors,
)
from megatron.remoe.training.failures import end_with_last_words  # noqa: E402
from megatron.remoe.training.gpt import forward_step, train_valid_test_datasets_provider  # noqa: E402
from megatron.remoe.training.loading import with_checked_weights  # noqa: E402
from megatron.training import pretrain  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.models.gpt import GPTModelConfig  # noqa: E402


def main(observe: Callable[[GPTModelConfig], None] | None = None) -> None:
    """Train as the command line says; an error ends the process with exit code 1 or 2 and one short message.

    Args:
        observe: called with the model's configuration before the model is built; for tools that measure.
    """
    try:
        _train(observe)
    except SystemExit:
        raise
    except BaseException as error:
        # With --exit-signal-handler Megatron's data loaders ignore the SIGTERM by which Python ends them, and an error
        # would hang in waiting for them instead of ending the other ranks. PyTorch raises an error where one is killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
        if isinstance(error, KeyboardInterrupt):
            raise
        end_with_last_words(error)


def _train(observe: Callable[[GPTModelConfig], None] | None) -> None:
    args = parse_and_validate_args(
        extra_args_provider=cpu.add_cpu_argument,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        adapt=cpu.adapt_arguments if ON_CPU else None,
    )
    with usage_errors(args.rank):
        model_cfg = gpt_config_from_args(args, config=transformer_config_from_args(args))
        install_relu_routing(args, model_cfg)
        install_local_layers(args, model_cfg)
    if observe is not None:
        observe(model_cfg)
    pretrain(
        pretrain_cfg_container_from_args(args, model_cfg),
        with_checked_weights(args, model_cfg, train_valid_test_datasets_provider),
        ModelType.encoder_or_decoder,
        forward_step,
    )


if __name__ == "__main__":
    main()
