"""Check flags before a run starts, and make its output folders.

A check raises a `UsageError` that names the flag, its value and the remedy, or a `DataError` if a folder cannot be
written. `args` are Megatron's arguments: parsed for `check_required_flags`, validated for the others.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
    """Refuse settings that Megatron ignores or gets wrong, or with which it fails late or loses work."""
    checks = (_launch, _ignored, _data, _pipeline, _saving, _skipped_steps)
    problems = [problem for check in checks for problem in check(args)]
    for code, lines in (("REMOE-E202", [*_pattern(args)]), ("REMOE-E203", problems)):
        if lines:
            raise UsageError("\n".join(lines), code)


def _pattern(args: argparse.Namespace) -> Iterator[str]:
    """Go on wrongly: Megatron builds the pattern's layers, and counts others."""
    pattern, experts = args.hybrid_layer_pattern, args.num_experts
    if pattern and bool(experts) != ("E" in pattern):
        yield (
            f"--hybrid-layer-pattern {pattern} with --num-experts {experts}: give --num-experts if the pattern has MoE "
            "layers (E), for instance '*E*E', and only then."
        )
    if pattern and "*" in pattern and args.multi_latent_attention:
        yield (
            f"--hybrid-layer-pattern {pattern} with --multi-latent-attention: * has neither latents nor rotary "
            "embedding. Use + for multi-latent attention."
        )


def _launch(args: argparse.Namespace) -> Iterator[str]:
    """Lose work: each task of srun or mpirun would train the whole model."""
    if os.environ.get("WORLD_SIZE") == "1" and any(int(os.environ.get(name) or 1) > 1 for name in TASKS):
        yield "srun or mpirun started several tasks, which train alone: start one torchrun per node, with --nnodes."


def _ignored(args: argparse.Namespace) -> Iterator[str]:
    """Go on wrongly: these have no effect."""
    # training/global_vars.py: set_global_variables passes on only --step-batch-size-schedule.
    if args.rampup_batch_size:
        yield "--rampup-batch-size: Megatron ignores it. Use --step-batch-size-schedule."
    if args.fim_data or args.sft or args.dataloader_inter_document_masking or args.logits_load_dir:
        yield (
            "--fim-data, --sft, --dataloader-inter-document-masking, --logits-load-dir: this program reads tokens from "
            ".bin/.idx files, with its own loss. Leave them out."
        )
    if args.inprocess_restart:
        yield "--inprocess-restart: this program does not restart in its process. Leave it out."
    if args.transformer_impl == "local" and "layernorm" in (args.recompute_modules or ()):
        yield "--recompute-modules layernorm: needs Transformer Engine. Leave it out."
    # training/dgrad_logging.py and training/activation_logging.py look for Transformer Engine's layers.
    if args.transformer_impl == "local" and (args.save_dgrads_interval or args.save_activations_interval):
        yield "--save-dgrads-interval, --save-activations-interval: need Transformer Engine. Leave them out."


def _data(args: argparse.Namespace) -> Iterator[str]:
    """Fail at the first evaluation, or go on with the wrong sets or lengths."""
    if args.full_validation != args.multiple_validation_sets:
        yield "--full-validation and --multiple-validation-sets: one does not work without the other. Give both."
    if args.full_validation and args.virtual_pipeline_model_parallel_size:
        yield "--full-validation with virtual pipeline stages: Megatron mixes up the sets. Leave one of the two out."
    # Megatron plans data and learning rates for --train-iters of --micro-batch-size.
    if args.step_batch_size_schedule and not (args.train_samples or args.skip_train):
        schedule = f"--step-batch-size-schedule {shown(args.step_batch_size_schedule)}"
        yield f"{schedule} needs --train-samples. Give it instead of --train-iters."


def _pipeline(args: argparse.Namespace) -> Iterator[str]:
    """Go on wrongly: inner pipeline stages get neither tokens nor masks (training/gpt.py: get_batch)."""
    layout = args.pipeline_model_parallel_layout or ""
    if "m" in layout.rpartition("|")[0]:
        yield (
            f"--pipeline-model-parallel-layout {layout}: only the first and the last stage get tokens. Put all m into "
            "the last stage."
        )
    if args.reset_attention_mask and _stages(args) > 2:
        yield "--reset-attention-mask: only the first and the last pipeline stage get the mask. Leave it out."


def _saving(args: argparse.Namespace) -> Iterator[str]:
    """Fail or hang at the first save, or write checkpoints that cannot be loaded."""
    if args.use_megatron_fsdp:
        yield "--use-megatron-fsdp: this program cannot resume its checkpoints. Leave it out."
    # training/checkpointing.py: iter_finalize_fn reads the tracker's content as a number.
    if args.save and args.save_retain_interval and newest_iteration(Path(args.save)) == RELEASE:
        given = f"--save-retain-interval: Megatron fails to save, as --save {args.save} holds a release."
        yield f"{given} Give a new --save."
    if args.async_save and args.distributed_backend == "gloo":
        yield "--async-save: its process needs a GPU, and the first save would wait for it forever. Leave it out."
    # core/models/common/language_module/language_module.py: tie_embeddings_and_output_weights_state_dict
    is_tied = args.pipeline_model_parallel_size > 1 and not args.untie_embeddings_and_output_weights
    if args.mtp_num_layers and is_tied and (args.save or args.load):
        yield (
            "--mtp-num-layers with pipeline stages: Megatron cannot save or load tied embeddings. Add "
            "--untie-embeddings-and-output-weights."
        )
    # core/optimizer/__init__.py sets init_state_fn = None for sgd.
    if args.optimizer == "sgd" and args.save and args.ckpt_format != "torch" and not args.no_load_optim:
        yield "--optimizer sgd with --save: Megatron cannot load its state. Add --no-load-optim or --ckpt-format torch."


def _skipped_steps(args: argparse.Namespace) -> Iterator[str]:
    """Lose work: training/training.py continues a skipped step before the save, and needs one data iterator."""
    skipped = args.iterations_to_skip or ()
    if skipped and (_stages(args) > 2 or (args.save and any(step % args.save_interval == 0 for step in skipped))):
        yield (
            f"--iterations-to-skip {shown(skipped)}: Megatron does not save in these steps, and fails with more than "
            "two pipeline stages, or virtual ones. Give a --save-interval that divides none, or leave it out."
        )


def _stages(args: argparse.Namespace) -> int:
    return int(args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1))


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
