"""Convert a dense or top-k checkpoint to a ReMoE, or start a different conversion."""

import argparse
import shlex
from pathlib import Path

import torch

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer

from ...console.errors import ConversionError
from ...recipes.megatron_values import make_parser
from ...runs.running import make_main
from ..arguments import parse_convert
from ..checkpoints import Checkpoint, check_output, find, load, save
from ..hf.settings import complete, make_words
from ..measuring import count_experts, mean_experts, measure_loss, split_batches
from ..megatron_model import build, one_process
from ..text import choose_blend, sample
from .fitting import fit_router
from .from_fork import convert_fork
from .model_class import convert_class
from .models import fill, record_routers, target_args

BOUNDS = {"dense": 0.01, "top-k": 0.05}
# λ starts higher than in a run from scratch, or the model would get denser at first. It moves less, or experts would be
# turned off before they differ.
GENTLE = "--moe-relu-l1-reg-coeff-init 1e-2 --moe-relu-l1-reg-coeff-multiplier 1.05".split()
# Arguments of the source that the printed command repeats where they are not Megatron's defaults.
REPEATED = """num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups
kv_channels qk_layernorm attention_dropout hidden_dropout normalization layernorm_epsilon swiglu squared_relu
add_bias_linear add_qkv_bias position_embedding_type rotary_base rotary_percent max_position_embeddings
init_method_std untie_embeddings_and_output_weights make_vocab_size_divisible_by vocab_size tokenizer_type
tokenizer_model vocab_file merge_file moe_relu_routing moe_relu_normalize num_experts moe_router_topk moe_granularity
moe_ffn_hidden_size moe_layer_freq moe_router_dtype moe_token_dispatcher_type moe_shared_expert_intermediate_size
moe_shared_expert_gate seq_length bf16 fp16 micro_batch_size global_batch_size train_iters lr min_lr lr_decay_style
lr_decay_iters lr_wsd_decay_style lr_wsd_decay_iters lr_warmup_iters lr_warmup_fraction weight_decay adam_beta1
adam_beta2 clip_grad seed data_path train_data_path valid_data_path test_data_path split multiple_validation_sets
validation_set_names full_validation eval_interval eval_iters save_interval""".split()


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
        with count_experts(target) as histograms:
            loss_after = measure_loss(target, split_batches(to_measure)).loss
        active, target_sparsity = mean_experts(histograms.values()), 1 - new_args.moe_router_topk / new_args.num_experts
        sparsity = 1 - active / new_args.num_experts
        bound = BOUNDS[kind] if options.loss_bound is None else options.loss_bound
        growth = loss_after / loss_before - 1
        result = f"loss {loss_before:.4f} before, {loss_after:.4f} after ({growth:+.2%}, bound {bound:.2%})"
        if not growth <= bound:
            raise ConversionError(
                f"{result}: nothing was written. Fit to more text (--tokens {4 * options.tokens}), or accept more with "
                "--loss-bound."
            )
        print(f"{result}; on {to_measure[:, 1:].numel():,} other tokens", flush=True)
        experts = f"{active:.1f} experts per token instead of {new_args.moe_router_topk}"
        print(f"starts at sparsity {sparsity:.3f}, target {target_sparsity:.3f}: {experts}", flush=True)
        save(target, new_args, options.save)
    print(f"wrote {options.save}. Train with:\n{shlex.join(training_command(new_args, options.save))}", flush=True)


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
    with record_routers(source, layers) as (inputs, gates):
        measure_loss(source, split_batches(to_fit))
    loss_before = measure_loss(source, split_batches(to_measure)).loss
    routers = {}
    for number, layer in enumerate(layers):
        seen = torch.cat(inputs.pop(layer))
        if args.num_experts is None:
            wanted, copies, start = torch.ones(len(seen), 1), new_args.num_experts, None
        else:
            wanted, copies = torch.cat(gates.pop(layer)), 1
            start = source.decoder.layers[layer].mlp.router.weight.detach()
        fit = fit_router(seen, wanted, copies, start, options.seed + number, new_args.moe_relu_normalize)
        routers[layer], about = fit, f"gates within {fit.error:.1%} (root mean square), sparsity {fit.sparsity:.3f}"
        print(f"layer {layer + 1} of {args.num_layers}: {about}", flush=True)
    fill(target, source, routers)
    for parameter in target.parameters():  # measure the weights that will be saved
        parameter.data = parameter.data.to(args.params_dtype).float()
    return target, loss_before


def training_command(args: argparse.Namespace, output: Path) -> list[str]:
    """Return the command that trains the ReMoE in `output`, with its source's flags."""
    values = {name: getattr(args, name) for name in REPEATED}
    for name in ("num_experts", "moe_router_topk"):
        values[name] //= args.moe_granularity
    if values["moe_ffn_hidden_size"]:
        values["moe_ffn_hidden_size"] *= args.moe_granularity
    if values["lr_decay_iters"] == values["train_iters"]:  # the default
        values["lr_decay_iters"] = None
    if args.full_validation:  # Megatron has replaced it by the number of steps of each set
        values["eval_iters"] = None
    usual = vars(make_parser().parse_args([]))
    values = {name: value for name, value in values.items() if value != usual.get(name)}
    places = ["--pretrained-checkpoint", str(output), "--save", "RUN", "--load", "RUN"]
    return ["remoe-pretrain", *places, *make_words(values), *GENTLE]


def run(options: argparse.Namespace) -> None:
    """Convert in the way that the flags name."""
    check_output(options.save)
    if options.from_fork:
        convert_fork(options)
    elif options.model:
        convert_class(options)
    else:
        convert(options)


main = make_main("convert", parse_convert, run, "stopped; nothing was written")
