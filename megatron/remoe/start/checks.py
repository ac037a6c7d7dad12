"""Check flags before a run starts, and make its output folders.

A check raises a `UsageError` that names the flag, its value and the remedy, or a `DataError` if a folder cannot be
written. `args` are Megatron's arguments: parsed for `check_required_flags`, validated for the others.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from megatron.remoe.files.errors import DataError, UsageError
from megatron.remoe.routing.refusals import shown
from megatron.remoe.start.checkpoint_files import RELEASE, newest_iteration

TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # variables of srun and mpirun: the number of tasks


def check_required_flags(args: argparse.Namespace) -> None:
    """Require the flags that Megatron misses only late, or does not name in its error."""
    needed = {
        "--seq-length": args.seq_length or args.encoder_seq_length,
        "--micro-batch-size": args.micro_batch_size,
        "--lr": args.lr is not None or args.skip_train,
        "--train-iters": args.train_iters or args.train_samples,
        "--eval-interval": args.eval_interval,
        "--save-interval (with --save)": not args.save or args.save_interval,
        "--vocab-size (with --tokenizer-type NullTokenizer)": args.tokenizer_type != "NullTokenizer" or args.vocab_size,
    }
    if missing := [flag for flag, given in needed.items() if not given]:
        raise UsageError(f"Missing: {', '.join(missing)}. Give a value above 0; there is no default.", "REMOE-E201")


def check_settings(args: argparse.Namespace) -> None:
    """Refuse settings that Megatron would silently ignore, or that would make it fail late.

    Some would fail at the first evaluation or save, which can be after the last step.
    """
    pattern, experts = args.hybrid_layer_pattern, args.num_experts
    if pattern and bool(experts) != ("E" in pattern):
        raise UsageError(
            f"--hybrid-layer-pattern {pattern} with --num-experts {experts}: give --num-experts if the pattern has MoE "
            "layers (E), for instance '*E*E', and only then.",
            "REMOE-E202",
        )
    if pattern and "*" in pattern and args.multi_latent_attention:
        raise UsageError(
            f"--hybrid-layer-pattern {pattern} with --multi-latent-attention: * has neither latents nor rotary "
            "embedding. Use + for multi-latent attention.",
            "REMOE-E202",
        )
    sets, layout = args.multiple_validation_sets, args.pipeline_model_parallel_layout or ""
    stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    size, parts = args.moe_ffn_hidden_size, args.expert_tensor_parallel_size
    is_tied = args.pipeline_model_parallel_size > 1 and not args.untie_embeddings_and_output_weights
    fsdp, interval = args.use_megatron_fsdp, args.moe_log_flips_interval
    warm_ups = [
        (args.lr_warmup_iters, args.lr_decay_iters or args.train_iters),
        (args.lr_warmup_samples, args.lr_decay_samples or args.train_samples),
    ]
    ignored = args.fim_data or args.sft or args.dataloader_inter_document_masking or args.logits_load_dir
    problems: dict[str, Any] = {
        "srun or mpirun started several tasks, which would train alone: start one torchrun per node, with --nnodes.": (
            os.environ.get("WORLD_SIZE") == "1" and any(int(os.environ.get(name) or 1) > 1 for name in TASKS)
        ),
        # training/checkpointing.py: iter_finalize_fn reads the tracker's content as a number.
        f"--save-retain-interval: Megatron fails to save, as --save {args.save} holds a release. Give a new --save.": (
            args.save and args.save_retain_interval and newest_iteration(Path(args.save)) == RELEASE
        ),
        "--full-validation and --multiple-validation-sets: one does not work without the other. Give both.": (
            args.full_validation != sets
        ),
        "--full-validation with virtual pipeline stages: Megatron mixes up the sets. Leave one of the two out.": (
            args.full_validation and args.virtual_pipeline_model_parallel_size
        ),
        # training/global_vars.py: set_global_variables passes on only --step-batch-size-schedule.
        "--rampup-batch-size: Megatron ignores it. Use --step-batch-size-schedule.": args.rampup_batch_size,
        # core/optimizer_param_scheduler.py: an assertion without a message
        "--lr-warmup-iters, --lr-warmup-samples: must be below --lr-decay-iters or -samples (default: --train-iters or "
        "-samples). Lower it.": any(warm_up and steps and warm_up >= steps for warm_up, steps in warm_ups),
        # Megatron plans data and learning rates for --train-iters of --micro-batch-size.
        f"--step-batch-size-schedule {shown(args.step_batch_size_schedule)} needs --train-samples. Give it instead "
        "of --train-iters.": args.step_batch_size_schedule and not (args.train_samples or args.skip_train),
        "--fim-data, --sft, --dataloader-inter-document-masking, --logits-load-dir: this program reads tokens from "
        ".bin/.idx files, with its own loss. Leave them out.": ignored,
        f"--moe-ffn-hidden-size {size} (after granularity): not divisible by --expert-tensor-parallel-size {parts}. "
        f"Give a divisor of {size}, for instance 1.": experts and size % parts,
        "--async-save: its process needs a GPU, and the first save would wait for it forever. Leave it out.": (
            args.async_save and args.distributed_backend == "gloo"
        ),
        f"--pipeline-model-parallel-layout {layout}: only the first and the last stage get tokens. Put all m into the "
        "last stage.": "m" in layout.rpartition("|")[0],
        # core/models/common/language_module/language_module.py: tie_embeddings_and_output_weights_state_dict
        "--mtp-num-layers with pipeline stages: Megatron cannot save or load tied embeddings. Add "
        "--untie-embeddings-and-output-weights.": args.mtp_num_layers and is_tied and (args.save or args.load),
        "--recompute-modules layernorm: needs Transformer Engine. Leave it out.": (
            args.transformer_impl == "local" and "layernorm" in (args.recompute_modules or ())
        ),
        # training/dgrad_logging.py and training/activation_logging.py look for Transformer Engine's layers.
        "--save-dgrads-interval, --save-activations-interval: need Transformer Engine. Leave them out.": (
            args.transformer_impl == "local" and (args.save_dgrads_interval or args.save_activations_interval)
        ),
        # core/optimizer/__init__.py sets init_state_fn = None for sgd.
        "--optimizer sgd with --save: Megatron cannot load its state. Add --no-load-optim, or --ckpt-format torch.": (
            args.optimizer == "sgd" and args.save and args.ckpt_format != "torch" and not args.no_load_optim
        ),
        # training/training.py: a skipped step continues before the save; dummy_train_step needs one data iterator.
        f"--iterations-to-skip {shown(args.iterations_to_skip)}: Megatron does not save in these steps, and fails with "
        "more than two pipeline stages, or virtual ones. Give a --save-interval that divides none, or leave it out.": (
            args.iterations_to_skip
            and (stages > 2 or (args.save and any(step % args.save_interval == 0 for step in args.iterations_to_skip)))
        ),
        # training/gpt.py: get_batch, as in Megatron
        "--reset-attention-mask: only the first and the last pipeline stage get the mask. Leave it out.": (
            args.reset_attention_mask and stages > 2
        ),
        "--inprocess-restart: this program does not restart in its process. Leave it out.": args.inprocess_restart,
        # Hooks do not see routers in a CUDA graph.
        f"--moe-log-flips-interval {interval}: give at least 1, --num-experts, and --cuda-graph-impl none.": (
            interval is not None and (interval < 1 or not experts or args.cuda_graph_impl != "none")
        ),
        # Megatron-FSDP computes wrong gradients with these.
        # .../megatron_fsdp.py: all_gather_and_wait_parameters_ready makes the fusion overwrite earlier micro-batches.
        "--use-megatron-fsdp: add --no-gradient-accumulation-fusion.": fsdp and args.gradient_accumulation_fusion,
        # core/distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py: gradient_reduce_preprocessing
        "--ddp-average-in-collective: Megatron-FSDP does not divide experts' gradients with it. Leave it out.": (
            fsdp and args.ddp_average_in_collective and args.expert_model_parallel_size > 1
        ),
        # If one rank of an instance holds a gradient, the same file divides it after each micro-batch. Only with
        # --overlap-grad-reduce does training/training.py tell it which micro-batch is the last.
        "--num-distributed-optimizer-instances: Megatron-FSDP computes wrong gradients with it in some layouts. Leave "
        "it out.": fsdp and args.num_distributed_optimizer_instances > 1,
    }
    if messages := [message for message, holds in problems.items() if holds]:
        raise UsageError("\n".join(messages), "REMOE-E203")


def make_output_folders(args: argparse.Namespace) -> None:
    """Make the folders that the run will write to."""
    for name in ("save", "tensorboard_dir"):
        folder = getattr(args, name)
        if folder and "://" not in folder:
            make_writable_folder(f"--{name.replace('_', '-')}", folder)


def make_writable_folder(flag: str, folder: str) -> None:
    """Make a folder, and check that a file can be made in it."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # a full disk still has room for empty files
    except OSError as error:
        raise DataError(
            f"{flag} {folder}: cannot be written ({error.strerror or error}). Give a writable folder.", "REMOE-E105"
        ) from error
