"""Train, and also write counts, router gradients and exponents of λ to a file per rank.

python record.py FOLDER ...    the other arguments go to the training entry
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path[0] = str(Path(__file__).resolve().parents[2])

from megatron.remoe import pretrain  # noqa: E402

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel


def full_gradient(chunk: "DistributedDataParallel", parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the whole reduced gradient; with a distributed optimizer each rank has only its share of it."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return parameter.main_grad  # type: ignore[attr-defined]
    buffer = next(buffer for buffer in chunk.buffers if parameter in buffer.param_index_map)
    start, end, number = buffer.param_index_map[parameter][:3]
    bucket, group = buffer.buckets[number], buffer.data_parallel_group
    whole = torch.empty_like(bucket.grad_data)
    share = bucket.grad_data.chunk(group.size())[group.rank()]
    torch.distributed.all_gather(list(whole.chunk(group.size())), share, group=group)
    return whole[start - bucket.offset : end - bucket.offset].view(parameter.shape)


def observe(model_cfg: Any) -> None:
    """Install a hook that updates this rank's record after the backward passes of each training step."""
    # Import only after the entry has adapted Megatron to the machine.
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.utils import get_model_config
    from megatron.remoe.routing.router import ReLURouter

    record: dict[str, Any] = {"exponents": [], "first_counts": {}, "router_gradients": {}}

    def install(chunks: list["DistributedDataParallel"]) -> list["DistributedDataParallel"]:
        config = get_model_config(chunks[0])
        finalize = config.finalize_model_grads_func or finalize_model_grads  # Megatron's default, set later
        routers = [(chunk, m) for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter)]

        def finalize_and_record(*arguments: Any, **options: Any) -> None:
            first = not record["exponents"]
            relu = [router for _, router in routers if isinstance(router, ReLURouter)]
            if first:
                for router in relu:
                    seen = [*router.counts["tokens_per_expert"].tolist(), float(router.counts["tokens"])]
                    record["first_counts"][router.layer_number] = seen
            finalize(*arguments, **options)
            if first:
                for chunk, router in routers:
                    gradient = full_gradient(chunk, router.weight)
                    record["router_gradients"][router.layer_number] = gradient.double().tolist()
            record["exponents"].append([int(router.l1_exponent) for router in relu])
            _write(record)

        config.finalize_model_grads_func = finalize_and_record
        return chunks

    model_cfg.post_wrap_hooks.append(install)


def _write(record: dict[str, Any]) -> None:
    (FOLDER / f"rank{os.environ['RANK']}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    FOLDER = Path(sys.argv.pop(1))
    pretrain.main(observe)
