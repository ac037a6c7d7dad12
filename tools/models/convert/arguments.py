"""Start a ReMoE from a dense or top-k MoE checkpoint, import a checkpoint, or change the model's class.

dense:         remoe convert --load DENSE --save OUT --num-experts 8
top-k:         remoe convert --load MOE --save OUT
Hugging Face:  remoe convert --from-hf FOLDER --save OUT
fork:          remoe convert --from-fork --load RUN --save OUT
Megatron-FSDP: remoe convert --from-fsdp --load RUN --save OUT
class:         remoe convert --load RUN --save OUT --model hybrid|gpt

The shape of a ReMoE, and the text that its routers are fitted to, come from the arguments in the checkpoint. Nothing is
written if the loss grows by more than a bound. Then train it like any ReMoE, with --pretrained-checkpoint OUT.

From Hugging Face: OLMoE, Qwen3-MoE, Mixtral or DeepSeek-V2, as a top-k MoE with the same logits. From the fork,
or with another class, the same training, of any routing, continues with --load OUT, optimizer state included.
From Megatron-FSDP, only weights are converted, to the format all tools read.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...console.flags import tool_parser, whole_number

OF_REMOE = ("num_experts", "moe_router_topk", "moe_granularity", "moe_layer_freq", "data_path", "loss_bound")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags. Megatron's flags keep their meaning."""
    parser = tool_parser("convert", __doc__)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--load", type=Path, metavar="FOLDER", help="checkpoints of a run (its --save)")
    add("--from-hf", type=Path, metavar="FOLDER", help="model saved by Hugging Face transformers")
    add = parser.add_argument
    add("--save", type=Path, required=True, metavar="FOLDER", help="folder to write")
    add("--ckpt-step", type=whole_number(0), metavar="N", help="iteration to convert (default: the newest)")
    text = "convert a checkpoint of the authors' fork (github.com/thu-ml/ReMoE)"
    add("--from-fork", action="store_true", help=text)
    add("--from-fsdp", action="store_true", help="convert a checkpoint of --use-megatron-fsdp (fsdp_dtensor)")
    text = "only change Megatron's model class; nothing is fitted or measured"
    add("--model", choices=("gpt", "hybrid"), help=text)
    add = parser.add_argument_group("shape of the ReMoE (default from a top-k checkpoint: its own)").add_argument
    add("--num-experts", type=int, metavar="E", help="experts, each as large as the dense layer")
    text = "k of the target sparsity; fewer than the k of a top-k checkpoint make it sparser (default: 1)"
    add("--moe-router-topk", type=int, metavar="K", help=text)
    add("--moe-granularity", type=whole_number(1), metavar="G", help="cut every expert into G (default: 1)")
    add("--moe-layer-freq", metavar="PATTERN", help="layers with experts (default: 1, all of them)")
    text = "layers that will load it (default: those that saved --load; with --from-hf: the installed ones)"
    add("--transformer-impl", choices=("local", "transformer_engine"), help=text)
    add = parser.add_argument_group("fit").add_argument
    add("--data-path", nargs="+", metavar="WORD", help="text, as in Megatron (default: the training's)")
    text = "tokens to fit the routers to, and as many again to measure the loss (default: %(default)s)"
    add("--tokens", type=whole_number(1), default=32768, metavar="N", help=text)
    text = "largest relative growth of the loss (default: 0.01 from dense, 0.05 from top-k)"
    add("--loss-bound", type=float, metavar="X", help=text)
    add("--seed", type=int, default=1234, help="of the text and the fit (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.loss_bound is not None and not args.loss_bound >= 0:
        parser.error(f"--loss-bound {args.loss_bound}: must be at least 0.")
    imported = args.from_hf or args.from_fork or args.from_fsdp
    if args.from_hf and (args.from_fork or args.from_fsdp or args.ckpt_step is not None):
        parser.error("--from-hf is not the folder of a run: leave out --from-fork, --from-fsdp and --ckpt-step.")
    if args.from_fork and args.from_fsdp:
        parser.error("--from-fork, --from-fsdp: a checkpoint has one format. Leave one of them out.")
    if args.model and imported:
        parser.error("--model needs a checkpoint of this project (torch_dist): import first, then change the class.")
    if args.transformer_impl and (args.from_fork or args.model):
        parser.error("--transformer-impl: the layers' names stay with --from-fork and --model. Leave it out.")
    given = [f"--{name.replace('_', '-')}" for name in OF_REMOE if getattr(args, name) is not None]
    if given and (imported or args.model):
        parser.error(
            f"an import or another class does not change the model: leave out {', '.join(given)}, and convert the "
            "result."
        )
    return args
