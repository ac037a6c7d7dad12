"""Continue texts with a trained model."""

import argparse
import sys
import time
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from megatron.remoe.hf import RemoeForCausalLM

from ..console.errors import ToolError
from ..runs.running import make_main
from .arguments import parse_generate
from .hf.opening import open_model
from .measuring import count_experts, mean_experts


def read_prompts() -> Iterator[str]:
    """Yield the lines of standard input that are not empty."""
    lines = (line.decode(errors="replace") for line in sys.stdin.buffer)
    yield from (line.rstrip("\r\n") for line in lines if line.strip())


def continue_text(
    model: RemoeForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, args: argparse.Namespace
) -> str:
    """Print the prompt and its continuation, token by token.

    Returns:
        A line with the number of tokens, their rate, and the mean number of experts per token and layer.

    Raises:
        ToolError: the prompt is empty or too long.
    """
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, return_special_tokens_mask=True)
    places = (encoded.pop("special_tokens_mask")[0] == 0).nonzero()
    end = int(places[-1]) + 1 if len(places) else None  # tokens that the tokenizer adds after it end a document
    inputs = {name: part[:, :end].to(model.device) for name, part in encoded.items()}
    length, context = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if not 0 < length < context:
        raise ToolError(
            f"the prompt has {length} tokens, and must have 1 to {context - 1}: the model's context is {context}.",
            "REMOE-E501",
        )
    sampling = (
        {"do_sample": True, "temperature": args.temperature, "top_k": 0} if args.temperature else {"do_sample": False}
    )
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    started = time.perf_counter()
    with count_experts(model) as counts, torch.inference_mode():
        output = model.generate(
            **inputs, **sampling, max_new_tokens=min(args.max_new_tokens, context - length), streamer=streamer
        )
    new = output.shape[1] - length
    line = f"{new} tokens, {new / (time.perf_counter() - started):.1f} tokens/s"
    if output.shape[1] == context:
        line += f", stopped at the model's context of {context} tokens"
    if counts:
        line += f", {mean_experts(counts.values()):.2f} experts per token and layer"
    return line


def generate(args: argparse.Namespace) -> None:
    """Continue each text.

    Raises:
        ToolError: something is wrong with the flags, the model or a text.
    """
    model, tokenizer, _ = open_model(args.load, args.ckpt_step, args.tokenizer_model)
    assert tokenizer is not None
    torch.manual_seed(args.seed)
    for prompt in read_prompts() if args.prompt is None else [args.prompt]:
        print(continue_text(model, tokenizer, prompt, args), file=sys.stderr, flush=True)


main = make_main("generate", parse_generate, generate)
