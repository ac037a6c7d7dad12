"""Test kernels that replace Megatron's against float64, in Triton's interpreter if there is no GPU."""

from types import SimpleNamespace

import pytest
import torch

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd, apply_rotary_pos_emb
from megatron.core.models.common.language_module import language_module
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.remoe import patches
from megatron.remoe.transformer.cross_entropy import vocab_parallel_cross_entropy
from megatron.remoe.transformer.rotary import fused_rotary_embedding
from tests.training_runs import REPOSITORY, run

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


@pytest.mark.skipif(DEVICE == "cuda", reason="interpreted, on two processes of the CPU")
def test_cross_entropy_over_a_shared_vocabulary() -> None:
    output = run(["vocabulary"], 2, script=REPOSITORY / "tests" / "split_sequence.py")
    assert "rank 0 ok" in output and "rank 1 ok" in output


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rotated", [16, 8], ids=["whole heads", "half of a head"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(interleaved: bool, rotated: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    sequence, batch, heads, size = 5, 2, 3, 16
    angles = random(sequence, 1, 1, rotated // 2)
    freqs = torch.stack((angles, angles), -1).flatten(-2) if interleaved else torch.cat((angles, angles), -1)
    among_others = random(sequence, batch, heads + 1, size, dtype=dtype)  # keys are a part of the projection's output
    t, upstream = among_others[:, :, 1:].detach().requires_grad_(), random(sequence, batch, heads, size, dtype=dtype)
    before = t.detach().clone()
    exact = t.detach().double().requires_grad_()
    expected = _apply_rotary_pos_emb_bshd(exact, freqs.double(), rotary_interleaved=interleaved)
    expected.backward(upstream.double())

    for _ in range(2):  # first builds the tables, then reuses them
        t.grad = None
        output = fused_rotary_embedding(t, freqs, interleaved)
        output.backward(upstream)
        assert output.dtype == dtype and torch.equal(t, before)
        torch.testing.assert_close(output.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(t.grad.double(), exact.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_megatrons_flags_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = language_module.fused_vocab_parallel_cross_entropy
    monkeypatch.setattr(language_module, "fused_vocab_parallel_cross_entropy", stock)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", None)
    with monkeypatch.context() as patched:  # Megatron then refuses rope fusion
        patched.setenv("TRITON_INTERPRET", "0")
        patched.setenv("CC", "no-such-compiler")
        patches.fusions.use_rotary_kernel()
        assert rope_utils.fused_apply_rotary_pos_emb is None
    patches.fusions.use_fla_cross_entropy()
    patches.fusions.use_rotary_kernel()
    assert rope_utils.fused_apply_rotary_pos_emb is fused_rotary_embedding

    config = SimpleNamespace(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="native")
    module = SimpleNamespace(config=config, pg_collection=SimpleNamespace(tp=None))
    logits, labels = random(3, 2, 16, dtype=torch.bfloat16), torch.randint(16, (2, 3), device=DEVICE)
    losses = LanguageModule.compute_language_model_loss(module, labels, logits)
    expected = torch.nn.functional.cross_entropy(logits.permute(1, 2, 0).double(), labels, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)

    config = SimpleNamespace(apply_rope_fusion=True, mrope_section=None, rotary_interleaved=False)
    t, freqs = random(5, 2, 3, 16), random(5, 1, 1, 8).repeat(1, 1, 1, 2)
    fused = apply_rotary_pos_emb(t, freqs, config, cp_group=SimpleNamespace())
    torch.testing.assert_close(fused, _apply_rotary_pos_emb_bshd(t, freqs))
