"""Multi-token prediction in GPTModel: Megatron makes its layers' specification itself, which no setting reaches."""

from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock


def rebuild_prediction_layers(change: Callable[[Any, int | None], Any], model_chunks: list[GPTModel]) -> list[GPTModel]:
    """A pre-wrap hook: build the layers of multi-token prediction anew, of what `change` makes of their specification.

    Args:
        change: from the block's submodules and the virtual pipeline stage.
        model_chunks: the model on this rank, as Megatron has built it.

    Returns:
        The same chunks.
    """
    for chunk in model_chunks:
        if chunk.mtp_process:
            submodules = change(chunk.mtp.submodules, chunk.vp_stage)
            chunk.mtp = MultiTokenPredictionBlock(chunk.config, submodules, chunk.vp_stage, chunk.pg_collection)
    return model_chunks
