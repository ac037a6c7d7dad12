"""Convert a dense or top-k checkpoint to a ReMoE, or start a different conversion."""

import argparse
from pathlib import Path
from shlex import quote

import torch

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer

from ...console.display import show_step
from ...console.errors import ConversionError
from ...runs.running import make_main
from ..arguments import parse_convert
from ..checkpoints import Checkpoint, check_output, find, load, save
from ..hf.settings import complete
from ..measuring import count_experts, mean_experts, measure_loss, split_batches
from ..megatron_model import build, one_process
from ..text import choose_blend, sample
from .fitting import fit_router, keep_largest
from .from_fork import convert_fork
from .from_fsdp import convert_fsdp
from .model_class import convert_class
from .models import fill, record_routers, target_args

BOUNDS = {"dense": 0.01, "top-k": 0.05}
# The way to the target is short, so λ should start higher and move less than in a run from scratch.
GENTLE = "--moe-relu-l1-reg-coeff-init 1e-2 --moe-relu-l1-reg-coeff-multiplier 1.05"


def convert(options: argparse.Namespace) -> None:
    """Convert a dense or top-k checkpoint to a ReMoE.

    Raises:
        UsageError: something is wrong with the flags, the checkpoint or the data, or the loss grows too much.
    """
    checkpoint = find(options.load, options.ckpt_step)
    if getattr(checkpoint.args, "hybrid_layer_pattern", None):
        raise ConversionError(f"{checkpoint.folder}: is a HybridModel's. Convert it with --model gpt first.")
    args = complete(checkpoint.args)
    new_args = target_args(args, options)
    kind = "dense" if args.num_experts is None else "top-k"
    shape = f"{args.num_layers} layers of hidden size {args.hidden_size}"
    print(f"{kind} checkpoint {checkpoint.name}: {shape}", flush=True)
    sequences = -(-options.tokens // args.seq_length)
    blend = choose_blend(args, options.data_path)
    to_fit, to_measure = sample(blend, 2 * sequences, args.seq_length, args.padded_vocab_size, options.seed).chunk(2)
    with one_process(options.seed):
        target, loss_before = _fit_routers(options, checkpoint, args, new_args, to_fit, to_measure)
        with show_step("running the ReMoE", len(to_measure)) as advance, count_experts(target) as histograms:
            loss_after = measure_loss(target, split_batches(to_measure), advance).loss
        sparsity = 1 - mean_experts(histograms.values()) / new_args.num_experts
        bound = BOUNDS[kind] if options.loss_bound is None else options.loss_bound
        growth = loss_after / loss_before - 1
        result = f"loss {loss_before:.4f} before, {loss_after:.4f} after ({growth:+.2%}, bound {bound:.2%})"
        if not growth <= bound:
            raise ConversionError(
                f"{result}: nothing was written. Fit to more text (--tokens {4 * options.tokens}), or accept more with "
                "--loss-bound."
            )
        print(f"{result}, sparsity {sparsity:.3f}; on {to_measure[:, 1:].numel():,} other tokens", flush=True)
        save(target, new_args, options.save)
    print(f"wrote {options.save}; train with {training_flags(new_args, options.save)}", flush=True)


def _fit_routers(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    args: argparse.Namespace,
    new_args: argparse.Namespace,
    to_fit: torch.Tensor,
    to_measure: torch.Tensor,
) -> tuple[GPTModel, float]:
    """Return the ReMoE with fitted routers, and the source's loss on `to_measure`, in nats per token."""
    source, target = build(args), build(new_args)
    load(checkpoint, source)
    layers = [number for number, layer in enumerate(target.decoder.layers) if isinstance(layer.mlp, MoELayer)]
    with show_step("running the source", len(to_fit) + len(to_measure)) as advance:
        with record_routers(source, layers) as (inputs, gates):
            measure_loss(source, split_batches(to_fit), advance)
        loss_before = measure_loss(source, split_batches(to_measure), advance).loss
    routers = {}
    with show_step("fitting the routers", len(layers)) as advance:
        for number, layer in enumerate(layers):
            seen = torch.cat(inputs.pop(layer))
            if args.num_experts is None:
                wanted = torch.ones(len(seen), new_args.moe_granularity)
                copies, start = new_args.num_experts // new_args.moe_granularity, None
            else:
                wanted, copies = torch.cat(gates.pop(layer)), 1
                if new_args.moe_router_topk < args.moe_router_topk:
                    wanted = keep_largest(wanted, new_args.moe_router_topk)
                start = source.decoder.layers[layer].mlp.router.weight.detach()
            routers[layer], error, sparsity = fit_router(seen, wanted, copies, start, options.seed + number)
            advance(1)
            fit = f"gates within {error:.1%} (root mean square), sparsity {sparsity:.3f}"
            print(f"layer {layer + 1} of {args.num_layers}: {fit}", flush=True)
    fill(target, source, routers)
    for parameter in target.parameters():  # measure the weights that will be saved
        parameter.data = parameter.data.to(args.params_dtype).float()
    return target, loss_before


def training_flags(args: argparse.Namespace, output: Path) -> str:
    """Return the flags to train the ReMoE with, in addition to those of its source."""
    granularity = args.moe_granularity
    flags = f"--pretrained-checkpoint {quote(str(output))} --moe-relu-routing"
    flags += f" --num-experts {args.num_experts // granularity} --moe-router-topk {args.moe_router_topk // granularity}"
    if granularity > 1:
        flags += f" --moe-granularity {granularity} --moe-ffn-hidden-size {args.moe_ffn_hidden_size * granularity}"
    if args.moe_layer_freq != 1:
        flags += f" --moe-layer-freq '{str(args.moe_layer_freq).replace(' ', '')}'"
    return f"{flags} {GENTLE}"


def run(options: argparse.Namespace) -> None:
    """Convert in the way that the flags name."""
    check_output(options.save)
    if options.from_fork:
        convert_fork(options)
    elif options.from_fsdp:
        convert_fsdp(options)
    elif options.model:
        convert_class(options)
    else:
        convert(options)


main = make_main("convert", parse_convert, run, "stopped; nothing was written")
