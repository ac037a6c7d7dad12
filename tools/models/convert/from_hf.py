"""Import a top-k MoE from a Hugging Face folder: OLMoE, Qwen3-MoE, Mixtral or DeepSeek-V2.

Each weight of Megatron's model is looked up in the folder; one that is missing there, or left over, is an error.
"""

import argparse
import gc
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from megatron.core.models.gpt import GPTModel

from ...console.display import Display
from ...console.errors import ConversionError
from ..checkpoints import save
from ..hf.folder import headers, weight_files
from ..hf.settings import parse_flags
from ..hf.weights import OUTER, Q_NORM, QKV, SAME
from ..megatron_model import EXPERT, build, one_process
from .hf_flags import flags_of, read_config

BOUND = 1e-4  # largest accepted difference of logits, as a share of the largest logit
TOKENS = 512
# Batch size, steps and learning rate are for the user to choose.
PROGRAM = "python pretrain_gpt.py --micro-batch-size 1 --global-batch-size 64 --train-iters 1000 --lr 1e-5"
PROGRAM += " --eval-interval 1000 --save RUN --load RUN --save-interval 500 --data-path DATA"
LAYER = re.compile(r"decoder\.layers\.(?P<number>\d+)\.(?P<rest>.+)")
# In a layer: Megatron's name → the folder's, mostly as in an exported folder. Several are put one below the other.
INNER = {name: [other] for name, other in SAME.items()} | {
    Q_NORM: ["self_attn.q_norm.weight"],
    QKV: [f"self_attn.{letter}_proj.weight" for letter in "qkv"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.shared_experts.linear_fc1.weight": [f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up")],
    "mlp.shared_experts.linear_fc2.weight": ["mlp.shared_experts.down_proj.weight"],
}
# Where a family's names differ.
RENAMED = {
    "mixtral": {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    "deepseek_v2": {"self_attn.q_norm": "self_attn.q_a_layernorm"},
}


def convert_hf(options: argparse.Namespace, display: Display) -> None:
    """Write the folder `options.from_hf` as a checkpoint to `options.save`, if the logits of both models agree.

    Raises:
        ConversionError: it holds no such model, or one that Megatron cannot express; it is damaged; the logits differ.
    """
    folder: Path = options.from_hf
    config = read_config(folder)
    flags = flags_of(folder, config)
    args = parse_flags(flags, config)
    display.say(f"{config.model_type}: {args.num_layers} layers of hidden size {args.hidden_size}, {args.num_experts} "
                f"experts, {args.moe_router_topk} per token")  # fmt: skip
    with one_process(options.seed):
        model = build(args)
        fill(model, config, folder)
        length = min(TOKENS, config.max_position_embeddings)
        tokens = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(options.seed))
        with torch.no_grad():
            logits = model(tokens, torch.arange(length)[None], None)
        has_engine = importlib.util.find_spec("transformer_engine") is not None
        args.transformer_impl = options.transformer_impl or ("transformer_engine" if has_engine else "local")
        difference = float((_logits(folder, tokens) - logits).abs().max() / logits.abs().max())
        result = f"largest difference of logits {difference:.1e} of the largest, on {length} random tokens"
        if not difference <= BOUND:
            raise ConversionError(f"{result}, above {BOUND:.0e}: nothing was written.", "REMOE-E514")
        display.say(result)
        save(model, args, options.save)
    display.say(
        f"wrote {options.save}. Train on from it:\n"
        f"{PROGRAM} {shlex.join(['--pretrained-checkpoint', str(options.save), *flags])}\n"
        f"or make a ReMoE with half the experts per token of it: remoe convert --load {options.save} "
        f"--save REMOE --moe-router-topk {max(1, args.moe_router_topk // 2)} --data-path DATA"
    )


@torch.no_grad()
def fill(model: GPTModel, config: Any, folder: Path) -> None:
    """Copy a folder's weights into Megatron's model.

    Raises:
        ConversionError: a file or tensor is missing, damaged, unexpected, not finite, or has another shape.
    """
    files: dict[str, Any] = {}
    for path in weight_files(folder):
        files |= dict.fromkeys((name for name, _, _ in headers(path)), safe_open(path, framework="pt"))
    unused = {name for name in files if not name.endswith("rotary_emb.inv_freq")}
    for name, tensor in model.state_dict().items():
        if not torch.is_tensor(tensor):
            continue
        names = _names(name, config)
        if missing := [one for one in names if one not in files]:
            raise ConversionError(f"{folder}: has no {missing[0]}, which its config.json calls for.")
        unused.difference_update(names)
        parts = [files[one].get_tensor(one) for one in names]
        if name.endswith(QKV):
            heads = [part.view(config.num_key_value_heads, -1, config.hidden_size) for part in parts]
            parts = [torch.cat(heads, dim=1).flatten(0, 1)]
        found = torch.cat(parts)
        if found.shape != tensor.shape:
            raise ConversionError(
                f"--from-hf: {', '.join(names)} should have the shape {list(tensor.shape)} together, and has "
                f"{list(found.shape)}."
            )
        if not found.isfinite().all():
            raise ConversionError(f"{folder}: {' or '.join(names)} holds values that are not finite.")
        tensor.copy_(found)
    if unused:
        raise ConversionError(f"--from-hf: {len(unused)} tensors, such as {min(unused)}, do not belong to the model.")


def _names(name: str, config: Any) -> list[str]:
    """Return the folder's names of the tensors that one of Megatron's is made of."""
    if (layer := LAYER.fullmatch(name)) is None:
        return [OUTER[name]]
    rest, prefix = layer["rest"], ""
    if expert := EXPERT.fullmatch(name):
        rest, prefix = f"mlp.{expert['weight']}", f"experts.{expert['expert']}."
    found = [other.replace("mlp.", f"mlp.{prefix}") for other in INNER[rest]]
    for old, new in RENAMED.get(config.model_type, {}).items():
        found = [other.replace(old, new) for other in found]
    return [f"model.layers.{layer['number']}.{other}" for other in found]


@torch.no_grad()
def _logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of transformers' own model, which is freed again."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    logits: torch.Tensor = model(tokens, use_cache=False).logits
    del model
    gc.collect()
    return logits
