"""Convert a GPTModel's checkpoint to a HybridModel's or back, optimizer state included.

A GPTModel's layer has attention and an MLP; a HybridModel's layer has one of the two. Weights, optimizer state and λ
are the same numbers under different names.
"""

import argparse
from shlex import quote

from megatron.remoe.start.checkpoint_files import common_state

from ...console.errors import ConversionError
from ..checkpoints import Checkpoint, find
from ..hybrid import FINAL_NORM, as_gpt, as_hybrid, hybrid_layer
from .rewriting import LAYER, read_content, split_layers, stack_layers, write_content

# Formats that store the optimizer's state under the weights' names.
RESHARDABLE = ("fully_reshardable", "fully_sharded_model_space")
ONLY_HYBRID = "output_layer._extra_state/shard_0_1"  # an empty object that GPTModel does not have


def convert_class(options: argparse.Namespace) -> None:
    """Write the checkpoint under `options.load` to `options.save` for the other class, `options.model`.

    Raises:
        ConversionError: it is of that class already, that class cannot express its layers, its optimizer state is
            stored by ranks, or it cannot be read or written.
    """
    checkpoint = find(options.load, options.ckpt_step)
    folder, saved = checkpoint.folder, checkpoint.args
    _check_convertible(checkpoint, options.model)
    to_hybrid = options.model == "hybrid"
    args = as_hybrid(saved) if to_hybrid else as_gpt(saved, folder)
    content = read_content(folder, checkpoint.index)
    if to_hybrid:
        content = {_rename(key, "gpt", "hybrid"): value for key, value in split_layers(content).items()}
        content[ONLY_HYBRID] = [None]
        flags = f"--hybrid-layer-pattern '{args.hybrid_layer_pattern}'"
    else:
        content = {_rename(key, "hybrid", "gpt"): value for key, value in content.items() if key != ONLY_HYBRID}
        flags = f"--num-layers {args.num_layers}"
        if args.moe_layer_freq == 1:
            content = stack_layers(content, args.num_layers)
        else:  # a list
            flags += f" --moe-layer-freq '{str(args.moe_layer_freq).replace(' ', '')}'"
    write_content(content, common_state(folder) | {"args": args}, options.save, folder.name)
    print(f"wrote {options.save}, {folder.name}; continue the run with --load {quote(str(options.save))} {flags}")


def _rename(key: str, source: str, target: str) -> str:
    layer = LAYER.fullmatch(key)
    if layer is None:
        return key.replace(FINAL_NORM[source], FINAL_NORM[target])
    number = int(layer["number"])
    number = hybrid_layer(number, layer["rest"]) if target == "hybrid" else number // 2
    return f"{layer['before']}{number}.{layer['rest']}"


def _check_convertible(checkpoint: Checkpoint, model: str) -> None:
    args, folder = checkpoint.args, checkpoint.folder
    if (model == "hybrid") == bool(getattr(args, "hybrid_layer_pattern", None)):
        raise ConversionError(f"{folder}: is a {model} model already (--model {model}).")
    if getattr(args, "mtp_num_layers", None):
        raise ConversionError(f"{folder}: layers of multi-token prediction are not converted.")
    kind = checkpoint.layout.get("distrib_optim_sharding_type")
    has_optimizer = any("optimizer." in key for key in checkpoint.index.state_dict_metadata)
    if has_optimizer and getattr(args, "use_distributed_optimizer", False) and kind not in RESHARDABLE:
        raise ConversionError(
            f"{folder}: the distributed optimizer's state is stored by ranks ({kind}), not by weights. Save once more "
            "with --dist-ckpt-optim-fully-reshardable."
        )
