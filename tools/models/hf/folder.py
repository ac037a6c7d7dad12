"""Read a model's folder with transformers. Code, pickles and adapters in it are never used."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

import megatron.remoe.hf  # noqa: F401  registers this project's model

from ...console.errors import ConversionError
from ..measuring import check_finite

SHOWN = 3  # tensors named in an error


def read_folder(folder: Path, families: Collection[str], dtype: torch.dtype | None = None) -> Any:
    """Return the model in a folder, one of transformers' classes, for evaluation on the CPU.

    Args:
        folder: written by `save_pretrained`.
        families: accepted values of `model_type`.
        dtype: of the weights (None: as stored).

    Raises:
        ConversionError: a file is missing or damaged; it is another kind of model, or quantized; a tensor is missing,
            unexpected, has another shape than config.json calls for, or holds NaN or infinity.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{folder}: has no config.json. Give a folder that save_pretrained has written.")
    if (folder / "adapter_config.json").exists():
        raise ConversionError(f"{folder}: holds an adapter. Merge it into the model and save that.")
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # problems are one error here
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        if config.model_type not in families or getattr(config, "quantization_config", None):
            kinds = " or ".join(sorted(families))
            raise ConversionError(f"{path}: is of {config.model_type!r:.40}, and must be of an unquantized {kinds}.")
        options |= {"config": config, "dtype": dtype or "auto", "use_safetensors": True}
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        options["generation_config"] = GenerationConfig()  # the folder's is not read, nor its code for generation
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except ConversionError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise ConversionError(f"{folder}: cannot be read ({reason}). Export or copy the model again.") from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    model, report = loaded
    for kind in ("missing", "unexpected", "mismatched"):
        if names := sorted(name if isinstance(name, str) else name[0] for name in report[f"{kind}_keys"]):
            shown = ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
            raise ConversionError(
                f"{folder}: {len(names)} tensors are {kind} for the model of config.json: {shown}. Export or copy the "
                "model again."
            )
    check_finite(str(folder), model.state_dict())
    return model.eval()
