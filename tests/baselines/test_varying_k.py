"""Test baseline routers with a varying number of experts per token: maps by hand, and the count of pairs."""

import torch

from megatron.remoe.training.pairs import PairCounter
from tests.baselines.layers import BATCH, DEVICE, PADDING, SEQUENCE, make_layer, make_tokens


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
