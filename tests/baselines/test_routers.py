"""Test baseline routers: maps against brute force, gradients, counts of pairs, layouts and refused settings."""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.remoe.baselines import ROUTERS
from megatron.remoe.baselines.hash import pass_token_ids
from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.gate_scale import initial_scale
from megatron.remoe.routing.refusals import RELU_VARIANTS
from megatron.remoe.training.pairs import PairCounter
from tests.baselines.layers import BATCH, DEVICE, PADDING, SEQUENCE, make_layer, make_tokens
from tests.layers import HIDDEN, expert_weights, make_config
from tests.tiny_model import TOPK
from tests.training_runs import TINY, logged, run, step_losses

# So that top-p's number of experts varies, and DECO's entropy changes the losses.
MORE = {"top_p": "--moe-router-topk 2", "deco": "--moe-relu-l1-reg-coeff-init 1e-2"}
BASELINE = "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0 --moe-baseline-router".split()


def test_the_flag_names_all_routers() -> None:
    [choices, nothing] = get_args(get_type_hints(ReMoEConfig)["moe_baseline_router"])
    assert set(get_args(choices)) == set(ROUTERS) and nothing is type(None)


def test_expert_choice_by_brute_force(process_groups: None) -> None:
    router, tokens = make_layer("expert_choice").router, make_tokens()
    scores = (tokens.detach() @ router.weight.detach().T).softmax(dim=-1)
    for mask in (None, PADDING):
        probs, routing_map = router(tokens, mask)
        expected = torch.zeros(SEQUENCE, BATCH, 4, dtype=torch.bool, device=DEVICE)
        for sequence in range(BATCH):
            for expert in range(4):
                places = [place for place in range(SEQUENCE) if mask is None or not mask[place, sequence]]
                places.sort(key=lambda place: float(scores[place, sequence, expert]), reverse=True)
                expected[places[: SEQUENCE * 2 // 4], sequence, expert] = True
        assert torch.equal(routing_map, expected.view(-1, 4))
        assert len(set(routing_map.sum(dim=1).tolist())) > 1
        torch.testing.assert_close(probs, (scores * expected).view(-1, 4))


def test_hash_goes_by_the_id_and_the_layer_alone(process_groups: None) -> None:
    router = make_layer("hash", num_moe_experts=8).router
    ids = torch.randint(0, 50000, (BATCH, 4096), device=DEVICE)
    maps = []
    for layer_number in (1, 2):
        router.set_layer_number(layer_number)
        router.token_ids = ids
        _, routing_map = router(torch.zeros(4096, BATCH, HIDDEN, device=DEVICE))
        maps.append(routing_map)
        assert routing_map.sum(dim=1).eq(2).all()
        first: dict[int, list[bool]] = {}
        for token, row in zip(ids.T.flatten().tolist(), routing_map.tolist(), strict=True):
            assert first.setdefault(token, row) == row
        share = torch.tensor(list(first.values()), dtype=torch.float64).mean(dim=0)
        torch.testing.assert_close(share, torch.full_like(share, 2 / 8), atol=0.02, rtol=0)
    both = (maps[0] & maps[1]).sum() / maps[0].sum()
    assert float(both) == pytest.approx(2 / 8, abs=0.02)  # the experts of another layer are independent


def test_normalized_gates(process_groups: None) -> None:
    router, tokens = make_layer("normalized_top_k", num_moe_experts=16).router, make_tokens()
    probs, routing_map = router(tokens)
    logits = tokens.view(-1, HIDDEN) @ router.weight.T
    gates = initial_scale(16, 2) * logits.relu() / logits.norm(dim=1, keepdim=True)
    assert routing_map.sum(dim=1).eq(2).all()
    torch.testing.assert_close(probs, gates * routing_map)
    router.weight.data *= 8
    torch.testing.assert_close(router(tokens)[0], probs)


@pytest.mark.parametrize("per_token", [False, True])
def test_deco_lowers_the_entropy(per_token: bool, process_groups: None) -> None:
    """The router's weight gets the gradient of λ times the entropy of the gates' shares. Here the loss adds none."""
    router, tokens = make_layer("deco", calculate_per_token_loss=per_token).router, make_tokens()
    assert router.scale.eq(0.1).all()
    router.l1_exponent.fill_(100)
    weight = router.weight.detach().clone().requires_grad_()
    gates = (tokens.detach()[~PADDING] @ weight.T).relu()
    shares = gates / (gates.sum(dim=-1, keepdim=True) + 1e-5)  # the small numbers are those of DECO's code
    entropy = -(shares * (shares + 1e-5).log()).sum(dim=-1)
    (router.l1_coefficient() * (entropy.sum() if per_token else entropy.mean())).backward()
    (router(tokens, PADDING)[0] * 0).sum().backward()
    (router(tokens, torch.ones_like(PADDING))[0] * 0).sum().backward()  # padding alone adds nothing
    assert weight.grad.abs().max() > 0.01
    torch.testing.assert_close(router.weight.grad, weight.grad)


def test_decos_guard_replaces_the_entropy(process_groups: None) -> None:
    router, tokens = make_layer("deco").router, make_tokens()
    router.l1_exponent.fill_(100)
    router.guarded.fill_(1)
    (router(tokens)[0] * 0).sum().backward()
    logits = tokens.detach() @ router.weight.T
    expected = torch.autograd.grad(-0.1 * (logits * (logits <= 0)).mean(), router.weight)[0]
    torch.testing.assert_close(router.weight.grad, expected)


def test_normalized_top_k_balances(process_groups: None) -> None:
    """The auxiliary loss is that of Switch, coefficient · E · Σ_e f_e · P_e, with the normalized gates' means P_e.

    Padding has no part in it.
    """
    settings = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5}
    router, tokens = make_layer("normalized_top_k", **settings).router, make_tokens()
    probs, routing_map = router(tokens, PADDING)
    (probs * 0).sum().backward()
    logits = tokens.detach()[~PADDING] @ router.weight.T
    gates = initial_scale(4, 2) * logits.relu() / logits.norm(dim=1, keepdim=True)
    shares = routing_map.sum(dim=0) / routing_map.sum()
    expected = torch.autograd.grad(0.5 * 4 * (shares * gates.mean(dim=0)).sum(), router.weight)[0]
    torch.testing.assert_close(router.weight.grad, expected)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "hash"])
def test_z_loss(name: str, process_groups: None) -> None:
    """Per token, as `finalize_model_grads` divides. `deco` stands for `ReLURouter`, whose z-loss it inherits."""
    router, tokens = make_layer(name, moe_z_loss_coeff=0.5, calculate_per_token_loss=True).router, make_tokens()
    (router(tokens, PADDING)[0] * 0).sum().backward()
    right = 0.5 * (tokens.detach()[~PADDING] @ router.weight.T).logsumexp(dim=-1).square().sum()
    torch.testing.assert_close(router.weight.grad, torch.autograd.grad(right, router.weight)[0])


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "grouped"])
@pytest.mark.parametrize("name", ROUTERS)
def test_layer_sums_what_the_map_says(name: str, fused: bool, process_groups: None) -> None:
    layer, tokens = make_layer(name, fused), make_tokens()
    probs, routing_map = layer.router(tokens)
    flat = tokens.view(-1, HIDDEN)
    expected = torch.zeros_like(flat)
    for gates, (fc1, fc2) in zip((probs * routing_map).T, expert_weights(layer), strict=True):
        gate, up = (flat @ fc1.T).chunk(2, dim=1)
        expected = expected + gates.unsqueeze(1) * ((torch.nn.functional.silu(gate) * up) @ fc2.T)
    output, _ = layer(tokens)
    torch.testing.assert_close(output.view(-1, HIDDEN), expected)
    weights = [tokens, *layer.parameters()]
    given = torch.autograd.grad(output.square().sum(), weights)
    assert all(gradient.abs().sum() > 0 for gradient in given)
    assert any(weight is layer.router.weight for weight in weights) == (name != "hash")
    for gradient, right in zip(given, torch.autograd.grad(expected.square().sum(), weights), strict=True):
        torch.testing.assert_close(gradient, right)


def test_the_embedding_hands_over_ids(process_groups: None) -> None:
    layer = make_layer("hash")
    embedding = LanguageModelEmbedding(layer.config, 16, SEQUENCE, position_embedding_type="rope").to(DEVICE)
    chunk = torch.nn.ModuleList([embedding, layer])
    pass_token_ids([chunk])
    layer.router.token_ids = None
    with pytest.raises(RuntimeError, match="has no token ids"):
        layer(make_tokens())
    for ids in (torch.randint(0, 16, (BATCH, SEQUENCE), device=DEVICE) for _ in range(2)):
        embedding(input_ids=ids, position_ids=None)
        assert layer.router.token_ids is ids


def assert_micro_batches_are_routed_alike(router: torch.nn.Module, micro_batches: list[torch.Tensor]) -> None:
    """Assert that recomputing micro-batches one by one, as a pipeline does, gives the maps of the first passes."""
    with torch.no_grad():
        first = [router(tokens)[1] for tokens in micro_batches]
    assert all(torch.equal(router(tokens)[1], seen) for tokens, seen in zip(micro_batches, first, strict=True))


def test_expert_thresholds_follow_the_batches(process_groups: None) -> None:
    """Half of the 24 tokens exceed each threshold (k = 2 of 4). Thresholds then move 1 % towards the batches' mean."""
    router, tokens = make_layer("expert_threshold").router, make_tokens()
    probs, routing_map = router(tokens)
    logits = (tokens.detach() @ router.weight.detach().T).view(-1, 4)
    ordered = logits.sort(dim=0, descending=True).values
    assert routing_map.sum(dim=0).tolist() == [12] * 4 and len(set(routing_map.sum(dim=1).tolist())) > 1
    torch.testing.assert_close(probs, logits.sigmoid() * routing_map)
    router.end_step()
    torch.testing.assert_close(router.thresholds.double() * 2.0**-32, ordered[12])

    shifted = [((tokens.detach() + more) @ router.weight.detach().T).view(-1, 4) for more in (1, 2)]
    moved = [one.sort(dim=0, descending=True).values[12] for one in shifted]
    assert_micro_batches_are_routed_alike(router, [tokens + 1, tokens + 2])
    router.end_step()
    mean = (moved[0] + moved[1]) / 2
    torch.testing.assert_close(router.thresholds.double() * 2.0**-32, ordered[12] + 0.01 * (mean - ordered[12]))
    router.eval()
    kept = router.thresholds.clone()
    assert torch.equal(router(tokens)[1], logits > kept.double() * 2.0**-32) and torch.equal(router.thresholds, kept)
    padding = torch.ones(SEQUENCE, BATCH, dtype=torch.bool, device=DEVICE)
    assert not router(tokens, padding)[1].any()
    padding[:4] = False
    new = make_layer("expert_threshold").router
    assert new(tokens, padding)[1].sum(dim=0).tolist() == [2 * BATCH] * 4, "half of the tokens without padding"
    router.train()(tokens * torch.nan)
    router.end_step()
    assert torch.equal(router.thresholds, kept) and router.batches == 2


def test_top_p_takes_the_fewest_experts_and_holds_their_number(process_groups: None) -> None:
    router, tokens = make_layer("top_p", num_moe_experts=8).router, make_tokens()
    router.threshold.fill_(int(0.6 / 2.0**-32))
    scores = (tokens.detach() @ router.weight.detach().T).softmax(dim=-1).view(-1, 8)
    probs, routing_map = router(tokens)
    for row, taken in zip(scores, routing_map, strict=True):
        ordered = row.sort(descending=True).values
        fewest = next(number for number in range(1, 9) if ordered[:number].sum() >= 0.6)
        assert taken.sum() == fewest and row[taken].min() >= ordered[fewest - 1]
    torch.testing.assert_close(probs, scores * routing_map)
    assert_micro_batches_are_routed_alike(router, [tokens, 2 * tokens])
    assert router.threshold == int(0.6 / 2.0**-32), "p moves after the step"

    averages = []
    for _ in range(200):
        averages.append(router(tokens)[1].double().sum(dim=1).mean())
        router.end_step()
    assert abs(float(sum(averages[-20:])) / 20 - 2) < 0.1, "k = 2, where 24 tokens allow no finer steps than 1/24"
    for _ in range(20):  # with all 8 experts per token, p and the sum of errors stop at their bounds
        router.seen.copy_(torch.tensor([8, 1]))
        router.end_step()
    assert router.threshold == 1 and router.errors == -2.5 * 2**32
    router.eval()
    kept = router.threshold.clone()
    padding = torch.ones(SEQUENCE, BATCH, dtype=torch.bool, device=DEVICE)
    assert not router(tokens, padding)[1].any() and torch.equal(router.threshold, kept)


def test_pairs_are_counted_once(process_groups: None) -> None:
    """Only training passes with gradients count, without padding. A second update does not count them again."""
    layer, tokens = make_layer("expert_threshold"), make_tokens()
    counter = PairCounter([layer])
    with torch.no_grad():
        layer.router(tokens)
    pairs = [int(layer.router(tokens, given)[1].sum()) for given in (None, PADDING)]
    layer.router.eval()
    layer.router(tokens)
    assert counter.totals() == {"total_active_pairs": 0, "total_layer_tokens": 0}
    counter.running_sums += 2**25  # sums of whole numbers stay exact
    expected = {"total_active_pairs": 2**27 + sum(pairs), "total_layer_tokens": 2**25 + 2 * SEQUENCE * BATCH - 3}
    for _ in range(2):
        counter.update()
        assert counter.totals() == expected


def test_padding_that_hash_layers_route_is_not_counted(process_groups: None) -> None:
    layer, tokens = make_layer("hash"), make_tokens()
    layer.router.token_ids = torch.arange(SEQUENCE * BATCH, device=DEVICE).view(BATCH, SEQUENCE)
    counter = PairCounter([layer])
    _, map_TE = layer.router(tokens.requires_grad_(), PADDING)
    counter.update()
    totals = counter.totals()
    assert map_TE.sum() == layer.router.topk * SEQUENCE * BATCH
    assert totals["total_active_pairs"] == layer.router.topk * totals["total_layer_tokens"] > 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"moe_relu_routing": True}, "--moe-relu-routing cannot be used with --moe-baseline-router hash"),
    ({"moe_router_score_function": "sigmoid"}, "--moe-router-score-function sigmoid cannot be used with"),
    ({"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size 2 cannot be used with"),
    ({"moe_baseline_router": "deco"}, "--moe-baseline-router deco changes the gates of ReLU routing"),
    (
        {"moe_baseline_router": "deco", "moe_relu_routing": True, "moe_relu_l1_reg_load_balancing": False},
        "--no-moe-relu-l1-reg-load-balancing cannot be used with --moe-baseline-router deco",
    ),
    ({"mtp_num_layers": 1}, "--mtp-num-layers 1 cannot be used with --moe-baseline-router hash"),
])  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_config(**{"moe_relu_routing": False, "moe_baseline_router": "hash"} | changes)
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["expert_threshold", "top_p", "normalized_top_k", "deco"])
def test_layouts_agree(name: str, data: Path, tmp_path: Path) -> None:
    """Two processes that share sequences and exchange tokens have the same losses as one process."""

    def train(*more: str, processes: int = 1) -> list[float]:
        shared = [*TINY, *TOPK, "--data-path", str(data), "--train-iters", "3", *BASELINE, name]
        shared += ["--moe-relu-routing"] * (name in RELU_VARIANTS)
        shared += MORE.get(name, "").split()
        return step_losses(run([*shared, *more], processes))

    whole = train("--save", str(tmp_path), "--save-interval", "1")
    assert whole[-1] < whole[0]
    last = logged(tmp_path, "log")[-1]
    assert last["total_layer_tokens"] == 3 * 8 * 64 * 2, "steps, sequences, their tokens, layers"
    assert (last["total_active_pairs"] == 3 * 8 * 64 * 2) == (name == "normalized_top_k"), "k = 1"
    split = "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"
    ranks = [*split.split(), "--expert-tensor-parallel-size", "1", "--load", str(tmp_path), "--ckpt-step", "1"]
    assert train(*ranks, processes=2) == pytest.approx(whole[1:], rel=1e-4)
