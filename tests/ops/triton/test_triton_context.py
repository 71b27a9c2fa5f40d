"""One sequence over several ranks with the Triton kernels, against one rank in float64. Each rank
runs them in the interpreter."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops.triton import config
from tests.ops.test_context_parallel import CASES, errors
from tests.ranks import on_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="wants the interpreter")
NEAR_EDGES = CASES[3]


@pytest.mark.parametrize(
    ("segment", "ranks", "cases"),
    [
        (2048, 2, [(132, None), NEAR_EDGES]),
        (64, 2, [(136, None), (136, [(0,), (0, 70)])]),
        (64, 4, CASES[2:]),
    ],
    ids=["one segment", "two segments", "documents"],
)
def test_ranks_compute_what_one_computes(monkeypatch, segment, ranks, cases):
    """In float32, with one and with several segments of a rank's tokens, and with documents, which
    may begin at the edges of ranks or be as long as several of them."""
    configure = config.configure
    monkeypatch.setattr(config, "configure", lambda *a: configure(*a)._replace(segment=segment))

    def code(rank):
        return [errors(rank, ranks, *case, torch.float32, "triton") for case in cases]

    found = on_ranks(ranks, code)
    assert max(max(map(max, each)) for each in found) < 1e-5, found
