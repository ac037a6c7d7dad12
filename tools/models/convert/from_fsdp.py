"""Write the weights of a Megatron-FSDP checkpoint (fsdp_dtensor) as a distributed one (torch_dist)."""

import argparse
from collections.abc import Mapping
from shlex import quote

import torch

from megatron.remoe.start.checkpoint_files import is_fsdp_index

from ...console.errors import ConversionError
from ..checkpoints import NORMS, open_folder, read_tensors, reading, save
from ..hf.settings import complete
from ..megatron_model import EXPERT, build, one_process

PREFIX = "model.module."
NAMES = NORMS | {".router.weight": ".router.relu_weight"}
# Names of latent attention's norms in Transformer Engine's layers
NAMES |= {f".{kind}_layernorm.": f".linear_{kind}_up_proj.layer_norm_" for kind in ("q", "kv")}


def convert_fsdp(options: argparse.Namespace) -> None:
    """Write the model under `options.load`, λ included, to `options.save`, without optimizer state.

    Raises:
        ConversionError: the checkpoint has a different format or cannot be read, or the output cannot be written.
    """
    folder, common, index = open_folder(options.load, options.ckpt_step)
    if not is_fsdp_index(index):
        raise ConversionError(f"{folder}: is not in Megatron-FSDP's format (fsdp_dtensor): leave out --from-fsdp.")
    with reading(folder):
        args = complete(common["args"])
    args.use_megatron_fsdp, args.ckpt_format = False, "torch_dist"
    with one_process(args.seed):
        model = build(args)
        parts: dict[str, torch.Tensor] = {}
        for name, tensor in model.state_dict().items():
            if torch.is_tensor(tensor):
                parts |= _match_keys(name, tensor, index.state_dict_metadata)
        read_tensors(folder, index, parts)
        save(model, args, options.save)
    print(f"wrote {options.save}; train with --pretrained-checkpoint {quote(str(options.save))}")


def _match_keys(name: str, tensor: torch.Tensor, keys: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Return the checkpoint's key of a tensor → the part to fill; the two halves of SwiGLU have one key each."""
    names = [name, *(name.replace(local, stored) for local, stored in NAMES.items())]
    if expert := EXPERT.fullmatch(name):
        names.append(f"{expert['mlp']}experts.{expert['weight']}{expert['expert']}")
    for key in (PREFIX + name for name in names):
        if key in keys:
            return {key: tensor}
        if f"{key}_w" in keys:
            gate, up = tensor.chunk(2)
            return {f"{key}_w": gate, f"{key}_v": up}
    raise ConversionError(f"the checkpoint has no {name}, which its arguments call for.")
