"""Test baseline routers with a varying number of experts per token: maps by hand, and the count of pairs."""

import pytest
import torch

from megatron.remoe.baselines.pairs import PairCounter
from tests.baselines.layers import BATCH, DEVICE, SEQUENCE, make_layer, make_tokens
from tests.layers import HIDDEN


def assert_micro_batches_are_routed_alike(router: torch.nn.Module, micro_batches: list[torch.Tensor]) -> None:
    """Assert that recomputing micro-batches one by one, as a pipeline does, gives the maps of the first passes."""
    with torch.no_grad():
        first = [router(tokens)[1] for tokens in micro_batches]
    assert all(torch.equal(router(tokens)[1], seen) for tokens, seen in zip(micro_batches, first, strict=True))


def test_expert_thresholds_follow_the_batches(process_groups: None) -> None:
    """Half of the 24 tokens exceed each threshold (k = 2 of 4). It then moves 1 % towards the batches' mean."""
    router, tokens = make_layer("expert_threshold").router, make_tokens()
    probs, routing_map = router(tokens)
    logits = (tokens.detach() @ router.weight.detach().T).view(-1, 4)
    ordered = logits.sort(dim=0, descending=True).values
    assert routing_map.sum(dim=0).tolist() == [12] * 4 and len(set(routing_map.sum(dim=1).tolist())) > 1
    torch.testing.assert_close(probs, logits.sigmoid() * routing_map)
    router.end_step()
    torch.testing.assert_close(router.thresholds.double() * 2.0**-32, ordered[12])

    moved = [
        ((tokens.detach() + more) @ router.weight.detach().T).view(-1, 4).sort(dim=0, descending=True).values[12]
        for more in (1, 2)
    ]
    assert_micro_batches_are_routed_alike(router, [tokens + 1, tokens + 2])
    router.end_step()
    mean = (moved[0] + moved[1]) / 2
    torch.testing.assert_close(router.thresholds.double() * 2.0**-32, ordered[12] + 0.01 * (mean - ordered[12]))
    router.eval()
    kept = router.thresholds.clone()
    assert torch.equal(router(tokens)[1], logits > kept.double() * 2.0**-32) and torch.equal(router.thresholds, kept)
    padding = torch.ones(SEQUENCE, BATCH, dtype=torch.bool, device=DEVICE)
    assert not router(tokens, padding)[1].any()


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
    router.eval()
    kept = router.threshold.clone()
    padding = torch.ones(SEQUENCE, BATCH, dtype=torch.bool, device=DEVICE)
    assert not router(tokens, padding)[1].any() and torch.equal(router.threshold, kept)


def test_null_experts_take_the_largest_of_all_and_balance(process_groups: None) -> None:
    """Of a token's 4 choices among 16, over 3 are real experts at first; the auxiliary loss lowers that to 2."""
    balanced = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
    router = make_layer("null_experts", num_moe_experts=8, **balanced).router
    tokens = make_tokens().detach()
    padding = torch.zeros(SEQUENCE, BATCH, dtype=torch.bool, device=DEVICE)
    padding[-3:, 0] = True
    probs, routing_map = router(tokens, padding)
    logits = (tokens @ router.weight.detach().T).view(-1, 16)
    for row, is_padding, gates, taken in zip(logits, padding.view(-1), probs, routing_map, strict=True):
        chosen = [] if is_padding else [int(place) for place in row.argsort(descending=True)[:4] if place < 8]
        assert taken.nonzero().flatten().tolist() == sorted(chosen)
        expected = torch.zeros(8, dtype=torch.float64, device=DEVICE)
        expected[chosen] = row[chosen].softmax(dim=0)
        torch.testing.assert_close(gates, expected)
    assert len(set(routing_map.sum(dim=1).tolist())) > 2

    with torch.no_grad():
        router.weight[8:] = router.weight[:8].mean(dim=0)
        tokens += 0.5
    assert router(tokens)[1].sum(dim=1).double().mean() > 3
    optimizer = torch.optim.Adam([router.weight], lr=0.01)
    averages = []
    for _ in range(300):
        probs, routing_map = router(tokens)
        averages.append(float(routing_map.sum(dim=1).double().mean()))
        optimizer.zero_grad()
        (0 * probs).sum().backward()  # only the auxiliary loss
        optimizer.step()
    assert sum(averages[-50:]) / 50 == pytest.approx(2, abs=0.2)


def test_a_sequence_shares_its_choices(process_groups: None) -> None:
    router, tokens = make_layer("sequence_topk").router, make_tokens()
    scores = (tokens.detach() @ router.weight.detach().T).softmax(dim=-1)
    for training in (True, False):
        router.train(training)
        probs, routing_map = router(tokens)
        torch.testing.assert_close(probs, (scores.view(-1, 4) * routing_map))
        for sequence, taken in enumerate(routing_map.view(SEQUENCE, BATCH, 4).unbind(dim=1)):
            assert not training or taken.sum() == 2 * SEQUENCE
            for token in range(SEQUENCE):
                end = SEQUENCE if training else token + 1  # no later token counts in evaluation
                least = scores[:end, sequence].flatten().sort(descending=True).values[2 * end - 1]
                assert torch.equal(taken[token], scores[token, sequence] >= least)
        assert len(set(routing_map.sum(dim=1).tolist())) > 1
    padding = torch.ones(SEQUENCE, BATCH, dtype=torch.bool, device=DEVICE)
    assert not router(tokens, padding)[1].any()


def test_experts_decide_for_themselves(process_groups: None) -> None:
    """Scores and the loss's gradient match those by hand; λ grows above k experts per token and falls below."""
    router, tokens = make_layer("routing_free").router, make_tokens()
    with torch.no_grad():
        router.scale.copy_(torch.tensor([0.3, 0.5, 1.0, 2.0]))
        router.shift.copy_(torch.tensor([0.0, 0.2, 0.5, 1.0]))
        router.exponent.fill_(30)
    padding = torch.zeros(SEQUENCE, BATCH, dtype=torch.bool, device=DEVICE)
    padding[-3:, 0] = True
    probs, routing_map = router(tokens, padding)
    lengths = torch.stack([(tokens.view(-1, HIDDEN) @ of.T).norm(dim=1) for of in router.weight.chunk(4)], dim=1)
    scores = lengths * router.scale - router.shift
    expected = (scores >= 1) & ~padding.view(-1, 1)
    assert torch.equal(routing_map, expected) and len(set(expected.sum(dim=1).tolist())) > 2
    torch.testing.assert_close(probs, scores * expected)
    number, loss = int((~padding).sum()), 0.0
    for token, of_token in enumerate(expected):
        for expert in of_token.nonzero().flatten().tolist():
            share = float(expected[:, expert].sum()) / number / 2 + float(of_token.double().mean()) / 2
            loss = loss + scores[token, expert] * share / (4 * number)
    weights = [router.weight, router.scale, router.shift, tokens]
    gradients = torch.autograd.grad(1e-5 * 1.2**30 * loss, weights, retain_graph=True)
    for found, gradient in zip(torch.autograd.grad((0 * probs).sum(), weights), gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-9)
    for pairs, exponent in ((20.0, 30), (21.0, 31), (19.0, 30)):
        router.end_step(torch.tensor(pairs, dtype=torch.float64), torch.tensor(10.0, dtype=torch.float64))
        assert router.exponent == exponent
    router.exponent.fill_(63)
    router.end_step(torch.tensor(21.0), torch.tensor(10.0))
    assert router.exponent == 63 and 1e-5 * 1.2**64 > 1, "λ stays at 1"


def test_pairs_are_counted_once(process_groups: None) -> None:
    """Only training passes with gradients count, without padding, and one update counts them."""
    layer, tokens = make_layer("expert_threshold"), make_tokens()
    counter = PairCounter([layer])
    padding = torch.zeros(SEQUENCE, BATCH, dtype=torch.bool, device=DEVICE)
    padding[-3:, 0] = True
    with torch.no_grad():
        layer.router(tokens)
    pairs = [int(layer.router(tokens, given)[1].sum()) for given in (None, padding)]
    layer.router.eval()
    layer.router(tokens)
    assert counter.totals() == {"total_active_pairs": 0, "total_layer_tokens": 0}
    for _ in range(2):
        counter.update()
        assert counter.totals() == {"total_active_pairs": sum(pairs), "total_layer_tokens": 2 * SEQUENCE * BATCH - 3}
