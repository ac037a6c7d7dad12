"""Check on 2 ranks that baseline routers that share a sequence route it like a router with the whole sequence."""

import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[2])

from megatron.remoe import cpu  # noqa: E402
from megatron.remoe.start import console  # noqa: E402

console.hide_unhelpful_warnings()
cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.remoe.baselines import ROUTERS  # noqa: E402
from megatron.remoe.baselines.pairs import PairCounter  # noqa: E402
from tests.layers import HIDDEN, make_config  # noqa: E402


def main() -> None:
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1234)
    rank = torch.distributed.get_rank()
    for name in ("hash", "expert_choice"):
        settings = {"moe_relu_routing": False, "moe_baseline_router": name, "moe_router_topk": 2}
        config = make_config(**settings, tensor_model_parallel_size=2, sequence_parallel=True)
        router = ROUTERS[name](config, ProcessGroupCollection.use_mpu_process_groups())
        router.set_layer_number(1)
        torch.manual_seed(7)
        tokens, ids = torch.randn(10, 2, HIDDEN, dtype=torch.float64), torch.randint(0, 300, (2, 10))
        if name == "hash":
            router.token_ids = ids
        else:
            router.weight.data = torch.randn_like(router.weight)
        counter = PairCounter([router])
        parts = router(tokens[rank * 5 : rank * 5 + 5])
        counter.update()
        # Route the same tokens in one piece, with groups of only this rank.
        router.tp_group = router.tp_cp_group = torch.distributed.new_subgroups(1)[0]
        wholes = router(tokens)
        for part, whole in zip(parts, wholes, strict=True):
            torch.testing.assert_close(part, whole[rank * 10 : rank * 10 + 10])
        assert counter.totals() == {"total_active_pairs": int(wholes[1].sum()), "total_layer_tokens": 20}
    print(f"rank {rank} ok", flush=True)


if __name__ == "__main__":
    main()
