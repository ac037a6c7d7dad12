"""Test the patch of docs/upstream.md: all pairs arrive. Megatron's all-to-all loses or invents pairs without it."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from tests.layers import HIDDEN, make_config
from tools.console.places import ROOT


def patched_source() -> str:
    """Return Megatron's file with the page's diff applied."""
    page = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
    hunk = page.split("token_dispatcher.py\n@@")[1].split("\n", 1)[1].split("--- a/")[0].split("```")[0].splitlines()
    old, new = ("\n".join(line[1:] for line in hunk if line[0] in kept) for kept in (" -", " +"))
    source = Path(token_dispatcher.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    return source.replace(old, new)


@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("rows", [
    pytest.param([[0, 1], [1, 2], [0, 3]], id="two each"),
    pytest.param([[0, 1, 2], [3], []], id="k per token in the mean"),
    pytest.param([[0, 1, 2, 3], [0, 2, 3], [1]], id="dense"),
])  # fmt: skip
def test_all_pairs_arrive(rows: list[list[int]], tmp_path: Path) -> None:
    tokens, map_TE = torch.rand(3, 1, HIDDEN, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.bool)
    for token, experts in enumerate(rows):
        map_TE[token, experts] = True
    probs_TE = map_TE * (torch.rand(3, 4, dtype=torch.float64) + 0.1)
    config = make_config(moe_router_topk=2)
    config.moe_router_dynamic_topk = True

    def all_pairs_arrive(module: Any) -> bool:
        groups = get_default_pg_collection()
        dispatcher = module.MoEAlltoAllTokenDispatcher(4, [0, 1, 2, 3], config, pg_collection=groups)
        try:
            given = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(tokens, map_TE, probs_TE))
            pairs, _, gates = dispatcher.dispatch_postprocess(*given)
            pairs = dispatcher.combine_preprocess(pairs * gates.unsqueeze(-1))
            output = dispatcher.combine_postprocess(dispatcher.token_combine(pairs))
            return torch.allclose(output, tokens * probs_TE.sum(dim=1).view(3, 1, 1))
        except (AssertionError, RuntimeError):
            return False

    (tmp_path / "patched.py").write_text(patched_source(), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("patched", tmp_path / "patched.py")
    assert spec is not None and spec.loader is not None
    patched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(patched)
    patched.torch = token_dispatcher.torch  # type: ignore[attr-defined]  # the CPU's if there is no GPU
    assert all_pairs_arrive(patched)
    assert all_pairs_arrive(token_dispatcher) is all(len(experts) == 2 for experts in rows), "Megatron has fixed it"
