"""Rebuild the layers of multi-token prediction in GPTModel, which no setting of Megatron changes."""

from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock


def rebuild_prediction_layers(change: Callable[[Any, int | None], Any], model_chunks: list[GPTModel]) -> list[GPTModel]:
    """Rebuild the layers of multi-token prediction from a changed specification; a pre-wrap hook.

    Args:
        change: returns the changed submodules of a block, from those and the virtual pipeline stage.
        model_chunks: the model on this rank, as Megatron built it; returned.
    """
    for chunk in model_chunks:
        if chunk.mtp_process:
            submodules = change(chunk.mtp.submodules, chunk.vp_stage)
            chunk.mtp = MultiTokenPredictionBlock(chunk.config, submodules, chunk.vp_stage, chunk.pg_collection)
    return model_chunks
