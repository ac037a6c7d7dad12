"""Test the cross entropy that replaces Megatron's against float64, in Triton's interpreter if there is no GPU."""

from types import SimpleNamespace

import pytest
import torch

from megatron.core.models.common.language_module import language_module
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.remoe import patches
from megatron.remoe.transformer.cross_entropy import vocab_parallel_cross_entropy
from tests.kernels import DEVICE

pytest.importorskip("triton")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 2, 130), (1, 1, 7), (2, 3, 1024)])
def test_cross_entropy(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits, target = 4 * random(*shape, dtype=dtype), torch.randint(shape[-1], shape[:2], device=DEVICE)
    upstream = random(*shape[:2]) * (target % 2)  # as with a loss mask: some tokens do not count
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact.permute(1, 2, 0), target.T, reduction="none").T
    expected.backward(upstream.double())

    given = logits.clone().requires_grad_()
    kept_logits = given * 1  # the output layer's logits, which nothing else reads
    losses = vocab_parallel_cross_entropy(kept_logits, target, None)
    assert losses.dtype == torch.float32
    losses.backward(upstream)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 10)
    assert torch.equal(kept_logits, given.grad), "the gradient lies where the logits were"


def test_megatrons_flag_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = language_module.fused_vocab_parallel_cross_entropy
    monkeypatch.setattr(language_module, "fused_vocab_parallel_cross_entropy", stock)
    patches.fusions.use_fla_cross_entropy()

    config = SimpleNamespace(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="native")
    module = SimpleNamespace(config=config, pg_collection=SimpleNamespace(tp=None))
    logits, labels = random(3, 2, 16, dtype=torch.bfloat16), torch.randint(16, (2, 3), device=DEVICE)
    losses = LanguageModule.compute_language_model_loss(module, labels, logits)
    expected = torch.nn.functional.cross_entropy(logits.permute(1, 2, 0).double(), labels, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
