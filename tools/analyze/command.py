"""What a model's router does with held-out text: figures 7, 8, 9, 11, 12 and table 12 of the paper, and more.

python tools/analyze --load RUN --data-path SET [SET...]        # RUN: a run, or a folder of tools/export_hf

Each data set is one domain. The folder that is written to holds a .json and a .png of each analysis, and the counts:
a call that was cut off goes on from them.
"""

import argparse
import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from megatron.remoe.data.indexed import bin_path
from megatron.remoe.hf import RemoeForCausalLM
from megatron.remoe.preflight.checkpoint_files import TRACKER

from ..common import short_names
from ..common.display import Display
from ..common.errors import ToolError
from ..common.expert_counts import expert_blocks
from ..common.files import lock, write_json
from ..common.flags import whole_number
from ..common.hf.opening import open_model
from ..common.running import run_to_the_end
from . import findings, pictures
from .counts import WINDOW, Counts
from .routing import watched
from .text import Text

TOKENS_PER_FORWARD = 4096
HASHED = 1021  # values of a tensor, at least; no power of two, so that they are not all of one column
SAVE_EVERY = 10.0  # seconds
SAVING = 0.05  # of the time, at most


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="tools/analyze", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load", type=Path, required=True, metavar="FOLDER", help="a run's folder, its --save, or an exported folder"
    )
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration of a run (default: the newest)")
    parser.add_argument(
        "--data-path", "--data", nargs="+", required=True, metavar="PREFIX", help="data sets, one for each domain"
    )
    parser.add_argument("--output-dir", type=Path, metavar="FOLDER", help="default: analysis/ in that of --load")
    parser.add_argument(
        "--seq-length", type=whole_number(WINDOW), metavar="N", help="as in training (default: the model's context)"
    )
    parser.add_argument(
        "--sequences", type=whole_number(1), metavar="N", help="of each data set, at most (default: all)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the order in which they are read (%(default)s)")
    parser.add_argument(
        "--expert-model-parallel-size", "--expert-parallel", type=whole_number(1), default=1, metavar="N",
        help="also say what each of so many ranks would have to do",
    )  # fmt: skip
    parser.add_argument("--tokenizer-model", type=Path, metavar="FOLDER", help="another tokenizer than the model's own")
    args = parser.parse_args(arguments)
    places = [Path(prefix).resolve() for prefix in args.data_path]
    if twice := next(
        (prefix for prefix, place in zip(args.data_path, places, strict=True) if places.count(place) > 1), None
    ):
        parser.error(f"--data-path {twice}: is given more than once. Give each data set once.")
    if not (args.load / TRACKER).exists() and (args.load / "checkpoints" / TRACKER).exists():
        args.load /= "checkpoints"
    args.output_dir = args.output_dir or args.load / "analysis"
    return args


def check(args: argparse.Namespace, model: RemoeForCausalLM) -> None:
    """Refuse what has no routing, and ranks that the experts cannot be dealt out to.

    Raises:
        ToolError: in these cases.
    """
    if not expert_blocks(model):
        raise ToolError(
            f"--load {args.load}: is a dense model, and has no routing to look at. Give one with --num-experts."
        )
    experts, ranks = model.config.num_experts, args.expert_model_parallel_size
    if experts % ranks:
        raise ToolError(f"--expert-model-parallel-size {ranks}: does not divide the model's {experts} experts.")


def inputs_of(args: argparse.Namespace, model: RemoeForCausalLM, texts: Sequence[Text]) -> dict[str, Any]:
    """Flag → what counts depend on: of the model some values of each of its tensors, which a training changes."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.flatten()[:: max(1, tensor.numel() // HASHED)]
        weights.update(name.encode() + values.float().cpu().numpy().tobytes())
    files = [bin_path(Path(text.prefix)).stat() for text in texts]
    return {
        "--load": [weights.hexdigest(), model.config.max_experts_per_token],
        "--data-path": [
            [text.prefix, text.tokens, file.st_size, file.st_mtime_ns] for text, file in zip(texts, files, strict=True)
        ],
        "--seq-length": texts[0].length,
        "--seed": args.seed,
    }


def layer_numbers(args: argparse.Namespace, model: RemoeForCausalLM) -> list[int]:
    """Megatron's, from 1, of the layers with experts; in a HybridModel attention is a layer of its own before each."""
    numbers = [*expert_blocks(model)]
    if (args.load / "config.json").is_file():
        return numbers
    from ..common.checkpoints import find  # an exported folder needs nothing of Megatron

    is_hybrid = getattr(find(args.load, args.ckpt_step).args, "hybrid_layer_pattern", None)
    return [2 * number for number in numbers] if is_hybrid else numbers


def counts_so_far(
    path: Path, inputs: dict[str, Any], layers: list[int], model: RemoeForCausalLM, most: int | None
) -> Counts:
    """Those of a call that was cut off, or none yet.

    Raises:
        ToolError: they were counted from something else, or from more than `most` sequences of a data set.
    """
    if not path.exists():
        config = model.config
        return Counts.none(layers, len(inputs["--data-path"]), config.num_experts, config.vocab_size)
    before, counts = Counts.load(path)
    if other := [flag for flag, value in inputs.items() if before[flag] != value]:
        raise ToolError(
            f"--output-dir {path.parent}: holds what was counted with other values of {', '.join(other)}. Give another "
            f"folder, or remove {path}."
        )
    if most is not None and (more := int(counts.sequences.max())) > most:
        raise ToolError(
            f"--sequences {most}: {path} has counted {more} of a data set. Give another --output-dir, or remove it."
        )
    return counts


@torch.inference_mode()
def count(
    model: RemoeForCausalLM, texts: Sequence[Text], counts: Counts, most: int | None, save: Callable[[], None],
    display: Display,
) -> None:  # fmt: skip
    """Read on where the counts end; `save` is called now and then, and at the end.

    Args:
        most: sequences of each data set.
    """
    saved, took = time.monotonic(), 0.0
    for domain, text in enumerate(texts):
        size, number = max(1, TOKENS_PER_FORWARD // text.length), min(len(text), most or len(text))
        with display.step(Path(text.prefix).name, number):
            display.advance(int(counts.sequences[domain]))
            for start in range(int(counts.sequences[domain]), number, size):
                ids = text.read(start, min(number, start + size))
                with watched(model, partial(counts.add_layer, domain, ids)):
                    model.model(ids.to(model.device), use_cache=False)
                counts.add_text(domain, ids)
                if (begin := time.monotonic()) - saved > max(SAVE_EVERY, took / SAVING):
                    save()
                    saved = time.monotonic()
                    took = saved - begin
                display.advance(len(ids))
    save()


def decoder(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[int], str | None]:
    """A token's text, where there is a tokenizer; of a part of a character its name in the vocabulary."""

    def text_of(token: int) -> str | None:
        if tokenizer is None:
            return None
        text = str(tokenizer.decode([token]))
        return str(tokenizer.convert_ids_to_tokens(token)) if "\N{REPLACEMENT CHARACTER}" in text else text

    return text_of


def write(
    args: argparse.Namespace, model: RemoeForCausalLM, tokenizer: PreTrainedTokenizerBase | None, counts: Counts
) -> dict[str, Any]:
    """Write a .json and a .png of each analysis, and return what is in them."""
    config = model.config
    topk, names = config.num_experts_per_tok, short_names.of_data_sets(args.data_path)
    found: dict[str, Any] = {
        "experts_per_token": findings.experts_per_token(counts),
        "load": findings.load(counts, names, topk / config.num_experts, decoder(tokenizer)),
        "balance": findings.balance(counts, topk, args.expert_model_parallel_size),
        "neighbours": findings.neighbours(counts),
        "gates": findings.gates(counts),
    }
    for name, numbers in found.items():
        write_json(args.output_dir / f"{name}.json", numbers)
        pictures.draw(args.output_dir / f"{name}.png", name, numbers)
    return found


def show(found: dict[str, Any]) -> None:
    """Print two lines a layer."""
    special, ranks = found["load"]["specialization"], found["balance"]["expert_parallel"]
    first, second = [], []
    for layer, experts in found["experts_per_token"]["layers"].items():
        balance, near, gate = (found[name]["layers"][layer] for name in ("balance", "neighbours", "gates"))
        over_even = [balance["imbalance"], balance["rank_imbalance"]][: 1 + (ranks > 1)]
        first.append(
            {
                "layer": str(layer),
                "experts per token": f"{experts['mean']:.3f}",
                "none": f"{experts['none']:.1%}",
                "99 %": str(experts["percentile_99"]),
                "largest": str(experts["largest"]),
                "sparsity": f"{balance['sparsity']:.4f}",
                "imbalance" + ", of ranks" * (ranks > 1): ", ".join(f"{one:.2f}" for one in over_even if one),
                "dead": str(len(balance["dead"])),
                "inactive": str(len(balance["inactive"])),
            }
        )
        second.append(
            {
                "layer": str(layer),
                "common (chance)": f"{near['common']:.1%} ({near['common_by_chance']:.1%})",
                f"of {WINDOW} tokens (chance)": f"{near['union']:.2f} ({near['union_by_chance']:.2f})",
                "gate": f"{gate['median']:.3g}" if gate else "",
                "largest has": f"{gate['largest_output']:.1%}" if gate else "",
                "domain bits (shuffled)": _beside_shuffled(special[layer]) if special else "",
            }
        )
    console = Console(highlight=False)
    for rows in (first, second):
        table = Table(box=None, pad_edge=False)
        for title in rows[0]:
            table.add_column(title, justify="right")
        for row in rows:
            table.add_row(*row.values())
        console.print(table, "")


def _beside_shuffled(special: findings.Numbers) -> str:
    shuffled = special["shuffled"]
    return f"{special['bits']:.4f} ({'too few' if shuffled is None else f'{shuffled:.4f}'})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 if something is wrong; 130 if it was stopped."""
    args = parse_arguments(arguments)
    return run_to_the_end(lambda: analyze(args))


def analyze(args: argparse.Namespace) -> int:
    """Count, write and show.

    Raises:
        ToolError: something is wrong with the flags, the model, the data or the folder.
    """
    model, tokenizer = open_model(args.load, args.ckpt_step, args.tokenizer_model, needs_tokenizer=False)
    check(args, model)
    length = args.seq_length or model.config.max_position_embeddings
    texts = [Text(prefix, length, args.seed, model.config.vocab_size) for prefix in args.data_path]
    inputs, path = inputs_of(args, model, texts), args.output_dir / "counts.pt"
    with lock(args.output_dir, "analysis"), Display() as display:
        counts = counts_so_far(path, inputs, layer_numbers(args, model), model, args.sequences)
        count(model, texts, counts, args.sequences, lambda: counts.save(path, inputs), display)
        found = write(args, model, tokenizer, counts)
    show(found)
    print(f"Pictures and figures: {args.output_dir}")
    return 0
