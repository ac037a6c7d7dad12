"""Test the experts with QuACK's functions, as the adapter calls them, against plain autograd."""

import pytest
import torch

from megatron.remoe.layer.fused_swiglu import FusedSwiGLU
from tests import quack_stand_in
from tests.layer.test_grouped_swiglu import (
    DEVICE,
    SIZES,
    both_gradients,
    both_orders,
    compare,
    leaves_of,
    one_by_one,
    order_of,
    some_rows,
)


@both_orders
@both_gradients
@pytest.mark.parametrize("sizes", [SIZES[name] for name in SIZES if name != "no rows"], ids=str)
def test_values_and_gradients(
    sizes: list[int], accumulates: bool, gathers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = quack_stand_in.put_in(monkeypatch)
    torch.manual_seed(len(sizes))
    num_tokens, rows = some_rows(sizes, gathers)
    ours, right = leaves_of(num_tokens, sizes, accumulates)
    starts = torch.tensor([0, *sizes], device=DEVICE).cumsum(0, dtype=torch.int32)
    output = FusedSwiGLU.apply(*ours, starts, order_of(rows), products)
    compare(output, one_by_one(*right, sizes, rows), ours, right, accumulates)
    assert not accumulates or all(weight.grad_added_to_main_grad for weight in ours[2:])


def test_stand_in_is_what_quack_documents() -> None:
    """It equals QuACK's own references, in the layouts that the adapter uses."""
    quack = pytest.importorskip("quack.gemm_interface", reason="needs quack-kernels")
    torch.manual_seed(1)
    starts, index = torch.tensor([0, 3, 3, 9], dtype=torch.int32), torch.randint(7, (9,))
    tokens, fc1, fc2 = torch.randn(7, 4), torch.randn(3, 6, 4), torch.randn(3, 4, 3)
    given = {"cu_seqlens_m": starts, "A_idx": index}
    hidden, activated = quack.gemm_gated_ref(
        tokens, fc1.transpose(1, 2), activation="swiglu", concat_layout=("B",), **given
    )
    found = quack_stand_in.gemm(tokens, fc1.transpose(1, 2), concat_layout=("B",), tuned=False, **given)
    torch.testing.assert_close(found, hidden)
    torch.testing.assert_close(quack.gated_to_pytorch_fn_map["swiglu"](*quack_stand_in.unpack(found)), activated)

    options = {"activation": "swiglu", "colvec_reduce": True, "dynamic_scheduler": False}
    options |= {"config": quack_stand_in.Config(tile_n=128)}
    found = quack_stand_in.gemm_dgated(tokens, fc2, hidden, colvec_scale=torch.ones(9), **options, **given)
    for mine, theirs in zip(found, quack.gemm_dgated_ref(tokens, fc2, hidden.clone(), "swiglu", **given), strict=False):
        torch.testing.assert_close(mine, theirs)

    back = quack.gemm_ref(hidden, fc1, cu_seqlens_m=starts, concat_layout=("B",))
    torch.testing.assert_close(
        quack_stand_in.gemm(hidden, fc1, cu_seqlens_m=starts, concat_layout=("B",), tuned=False), back
    )
    out = torch.ones(3, 6, 4)
    given = {"cu_seqlens_k": starts, "A_idx": index}
    quack_stand_in.gemm_add_inplace(tokens.T, hidden, out.transpose(1, 2), concat_layout=("out",), tuned=False, **given)
    # The reference puts the rows of a contiguous output in halves: here those of its transpose are.
    plain = quack.gemm_ref(tokens.T, hidden, **given).transpose(1, 2)
    torch.testing.assert_close(out - 1, torch.cat([plain[:, ::2], plain[:, 1::2]], dim=1))
