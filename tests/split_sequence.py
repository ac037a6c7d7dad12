"""Check two ranks that share a sequence (context or tensor_model, with a vocabulary) or experts (expert_model)."""

import itertools
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron.remoe import cpu  # noqa: E402
from megatron.remoe.start import unhelpful_warnings  # noqa: E402

unhelpful_warnings.hide_unhelpful_warnings()
cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.remoe.baselines import ROUTERS  # noqa: E402
from megatron.remoe.routing.controller import SparsityController  # noqa: E402
from megatron.remoe.routing.counts import RoutingCounts  # noqa: E402
from megatron.remoe.training.pairs import PairCounter  # noqa: E402
from megatron.remoe.transformer.cross_entropy import vocab_parallel_cross_entropy  # noqa: E402
from tests.layers import HIDDEN, make_config, make_layer  # noqa: E402


def l1_gradient(router: torch.nn.Module, tokens: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    router.counts = RoutingCounts.zeros(router.num_experts, tokens.device)
    probs, _ = router(tokens, padding)
    return torch.autograd.grad(probs.sum() * 0, router.weight)[0]


def main(kind: str) -> None:
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(**{f"{kind}_parallel_size": 2})
    model_parallel_cuda_manual_seed(1234)
    if kind == "expert_model":
        check_chunks()
    else:
        for kernels in ["torch", "triton"] if find_spec("triton") else ["torch"]:
            for per_token, guarded in itertools.product((False, True), (0, 1)):
                check(guarded, moe_kernels=kernels, calculate_per_token_loss=per_token)
        check(0, moe_relu_l1_reg_load_balancing=False)
    if kind == "tensor_model":
        for router in ("hash", "expert_choice"):  # tests/baselines trains the others
            check_baseline(router)
        check_dispatchers()
        if os.environ.get("TRITON_INTERPRET"):
            check_cross_entropy()
    print(f"rank {torch.distributed.get_rank()} ok", flush=True)


def check(guarded: int, **changes: Any) -> None:
    """Check that two ranks with half of a sequence each have the L1, S and λ of one rank with the whole sequence.

    With `guarded`, check the guard's gradient instead of that of L1.
    """
    rank = torch.distributed.get_rank()
    changes |= {"moe_relu_l1_reg_coeff_init": 0.3, "num_moe_experts": 8, "expert_tensor_parallel_size": 1}
    config = make_config(tensor_model_parallel_size=1, **changes)
    layer = make_layer(config)
    router = layer.router
    torch.manual_seed(7)
    router.weight.data = torch.randn_like(router.weight)
    tokens = torch.randn(10, 2, HIDDEN, dtype=torch.float64)
    padding = torch.zeros(10, 2, dtype=torch.bool)
    padding[7:, 0] = True

    part = slice(rank * 5, rank * 5 + 5)
    router.guarded.fill_(guarded)
    gradient = l1_gradient(router, tokens[part], padding[part])
    torch.distributed.all_reduce(gradient)
    controller = SparsityController([layer], config)
    controller.update()
    split, exponent = controller.summary(), int(router.l1_exponent)

    # All tokens at once, in a group of only this rank.
    router.l1_exponent.zero_()
    router.guarded.fill_(guarded)
    router.tp_cp_group = torch.distributed.new_subgroups(1)[0]
    whole_gradient = l1_gradient(router, tokens, padding)
    counts = router.counts
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-5, atol=1e-9)
    active, num_tokens = counts.active.item(), counts["tokens"].item()
    assert num_tokens == 17
    assert split.sparsity == 1 - active / (num_tokens * 8)
    shares = (counts["tokens_per_expert"] / num_tokens).tolist()
    assert split.tokens_per_expert[1] == [round(share, 5) for share in shares]
    torch.testing.assert_close(split.l1_loss, counts["l1_loss"].item(), rtol=1e-6, atol=0.0)
    assert exponent == (1 if active > num_tokens else -1)
    assert controller.totals() == {"total_active_pairs": active, "total_layer_tokens": num_tokens}  # each token once
    router.weight.grad = torch.full_like(router.weight, float("nan") if rank else 0.0)
    controller.update()
    assert not router.l1_exponent, "a gradient of one rank is not finite, so no rank moves λ"


def check_chunks() -> None:
    """Check that ranks with 10 tokens and with 1 use the same number of chunks, and have the results of one chunk."""
    results, weights = [], None
    for limit in (0.0, 2.0):
        layer = make_layer(make_config(expert_model_parallel_size=2, moe_relu_activation_limit=limit), fused=True)
        weights = weights or layer.state_dict()
        layer.load_state_dict(weights)
        layer.router.weight.data.abs_()  # all experts are active
        chunks: list[int] = []
        layer.experts.register_forward_hook(lambda *_, chunks=chunks: chunks.append(1))
        torch.manual_seed(7)
        tokens = torch.rand(1 if torch.distributed.get_rank() else 10, 1, HIDDEN, dtype=torch.float64).requires_grad_()
        output = layer(tokens)[0]
        assert len(chunks) == (2 if limit else 1)
        output.square().sum().backward()
        results.append([output, tokens.grad, *(weight.grad for weight in layer.parameters())])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


def check_baseline(name: str) -> None:
    """Check that both ranks route their parts as one rank routes the whole sequence."""
    rank, settings = torch.distributed.get_rank(), {"moe_relu_routing": False, "moe_router_topk": 2}
    config = make_config(**settings, moe_baseline_router=name, tensor_model_parallel_size=2, sequence_parallel=True)
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
    router.tp_group = router.tp_cp_group = router.tp_dp_cp_group = torch.distributed.new_subgroups(1)[0]
    wholes = router(tokens)
    for part, whole in zip(parts, wholes, strict=True):
        torch.testing.assert_close(part, whole[rank * 10 : rank * 10 + 10])
    assert counter.totals() == {"total_active_pairs": int(wholes[1].sum()), "total_layer_tokens": 20}
    assert counter.tokens_per_expert() == {1: [round(share, 5) for share in wholes[1].double().mean(dim=0).tolist()]}


def check_dispatchers() -> None:
    """Check that with shared experts both dispatchers give the tokens the same gradient."""
    gradients, weights = [], None
    settings = {"moe_relu_routing": False, "moe_baseline_router": "hash", "tensor_model_parallel_size": 2}
    settings |= {"sequence_parallel": True, "moe_shared_expert_intermediate_size": 12}
    for dispatcher, limit in (("alltoall", 0.0), ("allgather", 0.0), ("allgather", 2.0)):
        config = make_config(**settings, moe_token_dispatcher_type=dispatcher, moe_relu_activation_limit=limit)
        layer = make_layer(config, fused=True, router=ROUTERS["hash"])
        weights = weights or layer.state_dict()
        layer.load_state_dict(weights)
        layer.router.token_ids = torch.arange(20).view(2, 10)
        torch.manual_seed(7)
        tokens = torch.randn(5, 2, HIDDEN, dtype=torch.float64).requires_grad_()
        layer(tokens * 1)[0].square().sum().backward()
        gradients.append(tokens.grad)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def check_cross_entropy() -> None:
    """Check that two ranks with half of the vocabulary each get the losses and gradients of one rank."""
    gather = torch.distributed.all_gather_into_tensor  # NCCL can gather into a stack of tensors, gloo cannot

    def gather_stack(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: object) -> None:
        gather(output_tensor.flatten(), input_tensor, group=group)

    torch.distributed.all_gather_into_tensor = gather_stack
    rank = torch.distributed.get_rank()
    torch.manual_seed(1)
    logits, target = torch.randn(3, 2, 64), torch.randint(64, (3, 2))
    part = logits.chunk(2, dim=-1)[rank].clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(part * 1, target, torch.distributed.group.WORLD)
    losses.sum().backward()
    exact = logits.requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact.flatten(0, 1), target.flatten(), reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(losses.flatten(), expected)
    torch.testing.assert_close(part.grad, exact.grad.chunk(2, dim=-1)[rank])


if __name__ == "__main__":
    main(sys.argv[1])
