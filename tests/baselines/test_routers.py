"""Baseline routers: each map by brute force, gradients where they belong, layouts, and what is refused."""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.remoe.baselines import ROUTERS
from megatron.remoe.baselines.hash import hand_token_ids
from megatron.remoe.baselines.pairs import PairCounter
from megatron.remoe.moe.layer import ReMoELayer
from megatron.remoe.moe.specs import with_fused_layers, with_router
from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.problems import WITH_AUXILIARY_LOSS
from megatron.remoe.training.run_log import read_run_log
from tests.layers import HIDDEN, expert_weights, make_config
from tests.tiny_model import TOPK
from tests.trainings import REPOSITORY, TINY, run, series

SEQUENCE, BATCH = 8, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BALANCED = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1".split()
BASELINE = "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0 --moe-baseline-router".split()


def make_layer(name: str, fused: bool = False, **changes: Any) -> ReMoELayer:
    config = make_config(moe_relu_routing=False, moe_baseline_router=name, **{"moe_router_topk": 2} | changes)
    spec = with_router(get_gpt_layer_local_spec(config.num_moe_experts, False, normalization="RMSNorm"), ROUTERS[name])
    spec = with_fused_layers(spec) if fused else spec
    layer = spec.submodules.mlp(config=config, layer_number=1).to(DEVICE, torch.float64)  # type: ignore[union-attr]
    layer.set_layer_number(1)
    if name == "hash":
        layer.router.begin_batch(torch.arange(BATCH * SEQUENCE, device=DEVICE).view(BATCH, SEQUENCE) % 5)
    return layer


def make_tokens() -> torch.Tensor:
    return torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64, device=DEVICE, requires_grad=True)


def test_the_flag_names_all_routers() -> None:
    [choices, nothing] = get_args(get_type_hints(ReMoEConfig)["moe_baseline_router"])
    assert set(get_args(choices)) == set(ROUTERS) and nothing is type(None)


def test_expert_choice_by_brute_force(process_groups: None) -> None:
    router, tokens = make_layer("expert_choice").router, make_tokens()
    padding = torch.zeros(SEQUENCE, BATCH, dtype=torch.bool, device=DEVICE)
    padding[-3:, 0] = True
    scores = (tokens.detach() @ router.weight.detach().T).softmax(dim=-1)
    for mask in (None, padding):
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


def test_expert_thresholds_follow_the_batches(process_groups: None) -> None:
    """k = 2 of 4 experts: half of the 24 tokens exceed each threshold at first, which then moves by a hundredth."""
    router, tokens = make_layer("expert_threshold").router, make_tokens()
    probs, routing_map = router(tokens)
    logits = (tokens.detach() @ router.weight.detach().T).view(-1, 4)
    ordered = logits.sort(dim=0, descending=True).values
    assert routing_map.sum(dim=0).tolist() == [12] * 4 and len(set(routing_map.sum(dim=1).tolist())) > 1
    torch.testing.assert_close(probs, logits.sigmoid() * routing_map)
    torch.testing.assert_close(router.thresholds.double() * 2.0**-32, ordered[12])

    with torch.no_grad():  # the first pass of a recomputed layer
        again = router(tokens + 1)[1]
    assert torch.equal(again, router(tokens + 1)[1]), "the thresholds move after it"
    moved = ((tokens.detach() + 1) @ router.weight.detach().T).view(-1, 4).sort(dim=0, descending=True).values[12]
    torch.testing.assert_close(router.thresholds.double() * 2.0**-32, ordered[12] + 0.01 * (moved - ordered[12]))
    router.eval()
    kept = router.thresholds.clone()
    assert torch.equal(router(tokens)[1], logits > kept.double() * 2.0**-32) and torch.equal(router.thresholds, kept)
    padding = torch.ones(SEQUENCE, BATCH, dtype=torch.bool, device=DEVICE)
    assert not router(tokens, padding)[1].any()


def test_top_p_takes_the_fewest_experts_and_holds_their_number(process_groups: None) -> None:
    router, tokens = make_layer("top_p", num_moe_experts=8).router, make_tokens()
    router.threshold.fill_(int(0.6 / 2.0**-32))
    scores = (tokens.detach() @ router.weight.detach().T).softmax(dim=-1).view(-1, 8)
    with torch.no_grad():  # the first pass of a recomputed layer
        probs, routing_map = router(tokens)
    for row, taken in zip(scores, routing_map, strict=True):
        ordered = row.sort(descending=True).values
        fewest = next(number for number in range(1, 9) if ordered[:number].sum() >= 0.6)
        assert taken.sum() == fewest and row[taken].min() >= ordered[fewest - 1]
    torch.testing.assert_close(probs, scores * routing_map)
    assert torch.equal(router(tokens)[1], routing_map), "p moves after it"

    averages = [router(tokens)[1].double().sum(dim=1).mean() for _ in range(200)]
    assert abs(float(sum(averages[-20:])) / 20 - 2) < 0.1, "k = 2, where 24 tokens allow no finer steps than 1/24"
    router.eval()
    kept = router.threshold.clone()
    padding = torch.ones(SEQUENCE, BATCH, dtype=torch.bool, device=DEVICE)
    assert not router(tokens, padding)[1].any() and torch.equal(router.threshold, kept)


def test_null_experts_take_the_largest_of_all_and_balance(process_groups: None) -> None:
    """4 of 16 choices; the auxiliary loss brings 2 of them to the 8 experts on average, from no null expert at all."""
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
        (0 * probs).sum().backward()  # the auxiliary loss alone
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
    """Scores, loss and its gradient by hand; λ grows while there are more than k experts per token."""
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
    """Of tokens in training, without padding, and not of a forward pass that is recomputed."""
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


def test_hash_goes_by_the_id_and_the_layer_alone(process_groups: None) -> None:
    router = make_layer("hash", num_moe_experts=8).router
    ids = torch.randint(0, 50000, (BATCH, 4096), device=DEVICE)
    maps = []
    for layer_number in (1, 2):
        router.set_layer_number(layer_number)
        router.begin_batch(ids)
        _, routing_map = router(torch.zeros(4096, BATCH, HIDDEN, device=DEVICE))
        maps.append(routing_map)
        assert routing_map.sum(dim=1).eq(2).all()
        first: dict[int, list[bool]] = {}
        for token, row in zip(ids.T.flatten().tolist(), routing_map.tolist(), strict=True):
            assert first.setdefault(token, row) == row
        share = torch.tensor(list(first.values()), dtype=torch.float64).mean(dim=0)
        torch.testing.assert_close(share, torch.full_like(share, 2 / 8), atol=0.02, rtol=0)
    both = (maps[0] & maps[1]).sum() / maps[0].sum()
    assert float(both) == pytest.approx(2 / 8, abs=0.02)  # another layer's are independent


def test_random_is_drawn_anew_and_evenly(process_groups: None) -> None:
    router, tokens = make_layer("random").router, torch.zeros(4096, BATCH, HIDDEN, device=DEVICE)
    (_, first), (_, second) = router(tokens), router(tokens)
    assert first.sum(dim=1).eq(2).all()
    share = first.double().mean(dim=0)
    torch.testing.assert_close(share, torch.full_like(share, 2 / 4), atol=0.02, rtol=0)
    assert float((first & second).sum() / first.sum()) == pytest.approx(2 / 4, abs=0.02)


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "grouped"])
@pytest.mark.parametrize("name", ROUTERS)
def test_layer_sums_what_the_map_says(
    name: str, fused: bool, process_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, tokens = make_layer(name, fused), make_tokens()
    layer.router.train(name != "top_p")  # p would move from one call to the next
    probs, routing_map = layer.router(tokens)
    if name == "random":
        again = probs, routing_map
        monkeypatch.setattr(layer.router, "forward", lambda *_: again)
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
    assert any(weight is layer.router.weight for weight in weights) == (name not in ("hash", "random"))
    for gradient, of in zip(given, torch.autograd.grad(expected.square().sum(), weights), strict=True):
        torch.testing.assert_close(gradient, of)


def test_the_embedding_hands_over_ids(process_groups: None) -> None:
    layer = make_layer("hash")
    embedding = LanguageModelEmbedding(layer.config, 16, SEQUENCE, position_embedding_type="rope").to(DEVICE)
    chunk = torch.nn.ModuleList([embedding, layer])
    hand_token_ids([chunk])
    layer.router.token_ids = None
    with pytest.raises(RuntimeError, match="has no token ids"):
        layer(make_tokens())
    for ids in (torch.randint(0, 16, (BATCH, SEQUENCE), device=DEVICE) for _ in range(2)):
        embedding(input_ids=ids, position_ids=None)
        assert layer.router.token_ids is ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_relu_routing": True}, "--moe-relu-routing cannot be used with --moe-baseline-router hash"),
        ({"moe_warmup_topk": 3, "moe_warmup_steps": 1}, "--moe-warmup-topk cannot be used with --moe-baseline-router"),
        ({"moe_aux_loss_coeff": 0.01}, "--moe-aux-loss-coeff 0.01 cannot be used with --moe-baseline-router hash"),
        ({"moe_router_score_function": "sigmoid"}, "--moe-router-score-function sigmoid cannot be used with"),
        ({"moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor 1.0 cannot be used with"),
        ({"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size 2 cannot be used with"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm (on) cannot be used with"),
        ({"moe_baseline_router": "sequence_topk", "context_parallel_size": 2}, "--context-parallel-size 2 cannot be"),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_config(**{"moe_relu_routing": False, "moe_baseline_router": "hash"} | changes)
    assert message in str(error.value)


def test_parts_of_a_sequence_are_routed_as_the_whole() -> None:
    output = run([], 2, script=REPOSITORY / "tests" / "baselines" / "split_sequence.py")
    assert output.count(" ok") == 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["hash", "expert_threshold", "top_p", "null_experts", "sequence_topk", "routing_free"])
def test_layouts_agree(name: str, data: Path, tmp_path: Path) -> None:
    """One process, and two that share each sequence and exchange tokens with its experts."""

    def train(*more: str, processes: int = 1) -> list[float]:
        shared = [*TINY, *TOPK, "--data-path", str(data), "--train-iters", "3", *BASELINE, name]
        shared += BALANCED if name in WITH_AUXILIARY_LOSS else []
        losses = series(run([*shared, *more], processes), "lm loss")
        losses[1] = 2 * losses[1] - losses[0]  # the second line after a start tells the mean of both steps
        return losses

    whole = train("--save", str(tmp_path), "--save-interval", "1")
    assert whole[-1] < whole[0]
    last = [record for record in read_run_log(tmp_path / "metrics.jsonl") if record["kind"] == "log"][-1]
    assert last["total_layer_tokens"] == 3 * 8 * 64 * 2, "steps, sequences, their tokens, layers"
    assert (last["total_active_pairs"] == 3 * 8 * 64 * 2) == (name in ("hash", "top_p", "sequence_topk")), "k = 1"
    split = "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"
    ranks = [*split.split(), "--expert-tensor-parallel-size", "1", "--load", str(tmp_path), "--ckpt-step", "1"]
    assert train(*ranks, processes=2) == pytest.approx(whole[1:], rel=1e-4)
