"""Check torchrun's variables and flags before a training starts, and make its output folders.

A check raises a `UsageError`, which names the flag or variable, its value and the remedy; where a folder cannot be
written, a `DataError`. `args` are Megatron's arguments, validated unless stated otherwise.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from megatron.remoe.files.errors import DataError, UsageError
from megatron.remoe.routing.refusals import shown


def check_environment() -> None:
    """Check the environment variables that torchrun sets."""
    get, numbers = os.environ.get, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    port, wrong = get("MASTER_PORT", "0"), [name for name in numbers if not get(name, "0").isdecimal()]
    problems = [f"{name}={get(name)!r} in the environment is not a whole number" for name in wrong]
    if not wrong and int(get("RANK", "0")) >= int(get("WORLD_SIZE", "1")):
        problems.append(f"RANK={get('RANK')} in the environment must be below WORLD_SIZE={get('WORLD_SIZE')}")
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if "RANK" in os.environ and not get(name)]:
        problems.append(f"RANK={get('RANK')} is set in the environment and {missing[0]} is not")
    if not port.isdecimal() or int(port) > 65535:
        problems.append(f"MASTER_PORT={port!r} in the environment is not a port, 1024 to 65535")
    if problems:
        raise UsageError(
            f"{problems[0]}. torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: use it, or unset "
            "them all.",
            "REMOE-E101",
        )


def check_required_flags(args: argparse.Namespace) -> None:
    """Check that required flags are given, before validation: Megatron notices some late, and does not name others."""
    hybrid = args.hybrid_layer_pattern or args.hybrid_override_pattern
    heterogeneous = args.heterogeneous_layers_config_path or args.heterogeneous_layers_config_encoded_json
    needed = {
        "--num-layers": args.num_layers or args.encoder_num_layers or hybrid or heterogeneous,
        "--hidden-size": args.hidden_size or heterogeneous,
        "--num-attention-heads": args.num_attention_heads or heterogeneous,
        "--seq-length": args.seq_length or args.encoder_seq_length,
        "--max-position-embeddings": args.max_position_embeddings or heterogeneous,
        "--micro-batch-size": args.micro_batch_size,
        "--lr": args.lr is not None or args.skip_train,
        "--train-iters": args.train_iters or args.train_samples,
        "--log-interval": args.log_interval,
        "--eval-interval": args.eval_interval,
        "--save-interval (with --save)": not args.save or args.save_interval,
        "--vocab-size (with --tokenizer-type NullTokenizer)": args.tokenizer_type != "NullTokenizer" or args.vocab_size,
    }
    if missing := [flag for flag, given in needed.items() if not given]:
        raise UsageError(f"Missing: {', '.join(missing)}. Give a value above 0; there is no default.", "REMOE-E201")


def check_settings(args: argparse.Namespace) -> None:
    """Refuse settings that Megatron would silently ignore, or that it would fail at late.

    Some of them fail at the first evaluation or save, which can be after the training.
    """
    pattern, experts, frequency = args.hybrid_layer_pattern, args.num_experts, args.moe_layer_freq
    given, has_experts = f"--hybrid-layer-pattern {pattern}", "E" in (pattern or "")
    if pattern:
        _refuse(
            "REMOE-E202",
            {
                f"{given} has no MoE layer (E), and --num-experts {experts} has nothing to apply to. Put E where "
                "experts should be, for instance '*E*E', or leave --num-experts out.": experts and not has_experts,
                f"{given} has MoE layers (E): give --num-experts, or - for dense ones.": has_experts and not experts,
                f"--moe-layer-freq {shown(frequency)}: {given} says which layers have experts. Leave one out.": (
                    frequency != 1
                ),
                "--use-rope-scaling: HybridModel does not scale rope. Leave it out.": args.use_rope_scaling,
                f"--multi-latent-attention: * is another attention in {given}. Write + for a latent one.": (
                    args.multi_latent_attention and "*" in pattern
                ),
                "--overlap-moe-expert-parallel-comm: HybridModel has no schedule to overlap by. Leave it out.": (
                    args.overlap_moe_expert_parallel_comm
                ),
            },
        )
    sets, names, prefixes = args.multiple_validation_sets, args.validation_set_names, args.valid_data_path
    full = "--multiple-validation-sets with --full-validation"
    on_cpu = args.distributed_backend == "gloo"
    per_layer = args.save_dgrads_interval or args.save_activations_interval
    _refuse(
        "REMOE-E203",
        {
            f"--full-validation counts the sets that are evaluated. Give {full}.": args.full_validation and not sets,
            f"--multiple-validation-sets evaluates whole sets alone. Give {full}.": sets and not args.full_validation,
            "--full-validation: Megatron mixes the sets up with virtual pipeline stages. Leave one of them out.": (
                args.full_validation and args.virtual_pipeline_model_parallel_size
            ),
            "--validation-set-names names several sets. Add --multiple-validation-sets.": names and not sets,
            f"--validation-set-names {shown(names)}: give one name for each prefix of --valid-data-path.": (
                names and prefixes and len(names) != len(prefixes)
            ),
            "--non-persistent-save-interval: no destination given. Add --non-persistent-ckpt-type global.": (
                args.save and args.non_persistent_save_interval and not args.non_persistent_ckpt_type
            ),
            "--log-straggler needs a GPU and the package nvidia-ml-py. Install it, or leave it out.": (
                args.log_straggler and (on_cpu or not find_spec("pynvml"))
            ),
            # training/global_vars.py: set_global_variables passes only the other one on.
            "--rampup-batch-size: Megatron ignores it. Use --step-batch-size-schedule.": args.rampup_batch_size,
            # Megatron plans data and learning rates for --train-iters of --micro-batch-size.
            f"--step-batch-size-schedule {shown(args.step_batch_size_schedule)} needs --train-samples. Give it instead "
            "of --train-iters.": args.step_batch_size_schedule and not (args.train_samples or args.skip_train),
            "--fim-data, --sft, --dataloader-inter-document-masking, --logits-load-dir: this program reads tokens from "
            ".bin/.idx files, with its own loss. Leave them out.": (
                args.fim_data or args.sft or args.dataloader_inter_document_masking or args.logits_load_dir
            ),
            "--save-dgrads-interval, --save-activations-interval need Transformer Engine's layers, and it is not "
            "installed. Leave them out.": per_layer and not find_spec("transformer_engine"),
            "--save-tokens-per-expert-interval needs Transformer Engine's layers. Leave it out: metrics.jsonl has "
            "the numbers.": args.save_tokens_per_expert_interval and args.transformer_impl == "local",
            "--async-save needs a GPU: its process dies without one, and the first save waits for it. Leave it out.": (
                args.async_save and on_cpu
            ),
            f"--cuda-graph-impl {args.cuda_graph_impl} needs a GPU. Leave it out.": (
                args.cuda_graph_impl != "none" and on_cpu
            ),
            "--optimizer sgd: Megatron cannot load its state. Add --no-save-optim and --no-load-optim, without "
            "--use-distributed-optimizer.": args.optimizer == "sgd"
            and (args.use_distributed_optimizer or (args.save and not args.no_save_optim)),
            "--profile needs a GPU. Add --use-pytorch-profiler.": (
                args.profile and not args.use_pytorch_profiler and on_cpu
            ),
        }
        | (_of_fsdp(args) if args.use_megatron_fsdp else {}),
    )


def _of_fsdp(args: argparse.Namespace) -> dict[str, Any]:
    """Return the problems of --use-megatron-fsdp."""
    stages, experts = args.pipeline_model_parallel_size, args.expert_model_parallel_size
    instances = args.num_distributed_optimizer_instances
    divided = max(args.tensor_model_parallel_size, experts * args.expert_tensor_parallel_size)
    given = f"--num-distributed-optimizer-instances {instances}"
    return {
        "--use-megatron-fsdp needs einops, which is not installed. Install it.": not find_spec("einops"),
        # .../megatron_fsdp.py: all_gather_and_wait_parameters_ready lets it overwrite what micro-batches have added up.
        "--use-megatron-fsdp needs --no-gradient-accumulation-fusion. Add it.": args.gradient_accumulation_fusion,
        # core/transformer/fsdp_dtensor_checkpoint.py: split_swiglu_linear_fc1 reads megatron_fsdp_slice.
        "--data-parallel-sharding-strategy no_shard: Megatron cannot save SwiGLU layers so. Use optim.": (
            args.data_parallel_sharding_strategy == "no_shard" and args.swiglu and args.save
        ),
        # core/distributed/fsdp/mcore_fsdp_adapter.py: _get_dp_tp_mesh
        f"--pipeline-model-parallel-size {stages}: Megatron-FSDP's meshes have no stages. Leave one of them out.": (
            stages > 1
        ),
        # core/distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py: gradient_reduce_preprocessing
        "--ddp-average-in-collective: Megatron-FSDP does not divide experts' gradients with it. Leave it out.": (
            args.ddp_average_in_collective and experts > 1
        ),
        f"{given}: Megatron-FSDP divides the gradients of layers that one rank of an instance has alone after each "
        "micro-batch. Use fewer instances or expert parallel ranks.": (
            instances > 1 and args.world_size // instances == divided
        ),
        # training/training.py: train tells Megatron-FSDP with this flag alone which micro-batch is the last.
        f"{given}: with --use-megatron-fsdp they do not exchange gradients without --overlap-grad-reduce. Add it.": (
            instances > 1 and not args.overlap_grad_reduce
        ),
    }


def check_flips(args: argparse.Namespace) -> None:
    """Refuse settings that do not work with --moe-log-flips-interval."""
    interval, graphs = args.moe_log_flips_interval, args.cuda_graph_impl
    if interval is None:
        return
    given = f"--moe-log-flips-interval {interval}"
    _refuse(
        "REMOE-E208",
        {
            f"{given}: must be at least 1. Leave it out to measure no flips.": interval < 1,
            f"{given}: there are no experts whose routing could change. Leave it out.": not args.num_experts,
            f"{given} cannot be used with --cuda-graph-impl {graphs}: decisions of routers in a graph are not seen. "
            "Leave it out, or use --cuda-graph-impl none.": graphs != "none",
            f"{given} cannot be used with --reuse-grad-buf-for-mxfp8-param-ag: the weights are incomplete after an "
            "update. Leave one of them out.": args.reuse_grad_buf_for_mxfp8_param_ag,
        },
    )


def check_local_layers(args: argparse.Namespace, stacks_experts: bool) -> None:
    """Refuse settings with which the layers of --transformer-impl local fail, or would use another optimizer.

    Args:
        args: see above.
        stacks_experts: whether an expert's weights are a slice of a three-dimensional parameter.
    """
    routed = args.moe_relu_routing or args.moe_baseline_router or args.moe_warmup_topk is not None
    megatrons_experts = args.num_experts and not args.local_layer_fusion and not routed
    _refuse(
        "REMOE-E209",
        {
            # core/transformer/moe/experts.py: SequentialMLP; its linear layers add biases in place.
            "--no-local-layer-fusion cannot be used with --num-experts and biases: Megatron's experts fail in the "
            "first step. Add --disable-bias-linear, or leave out --no-local-layer-fusion.": (
                megatrons_experts and args.add_bias_linear and args.expert_model_parallel_size == 1
            ),
            # core/transformer/dot_product_attention.py: DotProductAttention takes one size of heads.
            f"--mtp-num-layers {args.mtp_num_layers} cannot be used with --multi-latent-attention and "
            "--transformer-impl local: Megatron cannot build its layers. Leave it out, or use --transformer-impl "
            "transformer_engine.": args.mtp_num_layers and args.multi_latent_attention,
            # core/optimizer/emerging_optimizers.py: _is_nonlinear_or_embedding.
            f"--optimizer {args.optimizer} would train the experts of --transformer-impl local with Adam: it takes "
            "two-dimensional weights, and theirs are stacked. Add --no-local-layer-fusion, or use --optimizer adam.": (
                stacks_experts and args.optimizer not in ("adam", "sgd")
            ),
        },
    )


def _refuse(code: str, problems: Mapping[str, Any]) -> None:
    """Raise an error with the messages of all problems that hold."""
    if found := [message for message, holds in problems.items() if holds]:
        raise UsageError("\n".join(found), code)


def make_output_folders(args: argparse.Namespace) -> None:
    """Make the folders that the training will write into."""
    for name in ("save", "tensorboard_dir", "data_cache_path"):
        folder = getattr(args, name)
        # Megatron writes nothing into a cache that holds the index already.
        may_be_read_only = name == "data_cache_path" and os.path.isdir(folder or "")
        if folder and "://" not in folder and not may_be_read_only:
            make_writable_folder(f"--{name.replace('_', '-')}", folder)


def make_writable_folder(flag: str, folder: str) -> None:
    """Make a folder, and check that a file can be made in it."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(
            f"{flag} {folder}: cannot be written ({error.strerror or error}). Give a folder that can.", "REMOE-E105"
        ) from error
