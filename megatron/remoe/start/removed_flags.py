"""Flags of the authors' fork (Megatron of December 2024) that Megatron no longer has."""

RETRO = "--retro-add-retriever --retro-attention-gate --retro-cyclic-train-iters --retro-encoder-attention-dropout"
RETRO += " --retro-encoder-hidden-dropout --retro-encoder-layers --retro-no-verify-neighbor-count --retro-num-neighbors"
RETRO += " --retro-num-retrieved-chunks --retro-project-dir --retriever-seq-length"
NO_ENCODER = ("GPT models have no encoder", "")

# flag: (why it was removed, what to give instead, or "")
REMOVED: dict[str, tuple[str, str]] = {
    "--use-legacy-models": ("Megatron has no legacy models any more", ""),
    "--moe-use-legacy-grouped-gemm": (
        "local experts are always grouped, and Transformer Engine's are with its replacement",
        "--moe-grouped-gemm",
    ),
    "--moe-extended-tp": ("experts have their own tensor parallel size", "--expert-tensor-parallel-size"),
    "--standalone-embedding-stage": (
        "the embedding counts as a layer of the pipeline",
        "--account-for-embedding-in-pipeline-split",
    ),
    "--renormalize-blend-weights": ("weights of data sets are always used as given", ""),
    "--s3-cache-path": ("it serves other object stores too", "--object-storage-cache-path"),
    "--tiktoken-special-tokens": ("it serves other tokenizers too", "--tokenizer-special-tokens"),
    "--hybrid-attention-ratio": ("the pattern lists every layer", "--hybrid-layer-pattern"),
    "--hybrid-mlp-ratio": ("the pattern lists every layer", "--hybrid-layer-pattern"),
    "--no-async-tensor-model-parallel-allreduce": ("Megatron always overlaps this all-reduce", ""),
    "--no-scatter-gather-tensors-in-pipeline": ("Megatron decides this", ""),
    "--encoder-tensor-model-parallel-size": NO_ENCODER,
    "--encoder-pipeline-model-parallel-size": NO_ENCODER,
    "--pipeline-model-parallel-split-rank": NO_ENCODER,
    **dict.fromkeys(RETRO.split(), ("Megatron no longer trains RETRO models", "")),
}


def explain(flag: str) -> str:
    """Return why a flag no longer exists and what to give instead, or "" for a flag that never existed."""
    if flag not in REMOVED:
        return ""
    reason, replacement = REMOVED[flag]
    return f"{flag} no longer exists: {reason}. {f'Give {replacement} instead' if replacement else 'Leave it out'}."
