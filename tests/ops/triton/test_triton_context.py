"""One sequence over several ranks with the Triton kernels, against one rank in float64. Each rank
runs them in the interpreter."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops.triton import config
from tests.ops.test_context_parallel import errors
from tests.ranks import on_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="wants the interpreter")
# Documents begin within W - 1 tokens of the edges of four ranks' parts; one is as long as three.
NEAR_EDGES_AND_LONG = (24, [(0, 5, 13), (0, 20)])


@pytest.mark.parametrize(
    ("segment", "ranks", "case"),
    [
        (2048, 2, (132, None)),
        (64, 2, (136, [(0,), (0, 70)])),
        (64, 4, NEAR_EDGES_AND_LONG),
    ],
    ids=["one segment", "two segments", "documents"],
)
def test_ranks_compute_what_one_computes(monkeypatch, segment, ranks, case):
    """In float32, with one and with several segments of a rank's tokens, and with documents."""
    configure = config.configure
    monkeypatch.setattr(config, "configure", lambda *a: configure(*a)._replace(segment=segment))

    def code(rank):
        return errors(rank, ranks, *case, torch.float32, "triton")

    found = on_ranks(ranks, code)
    assert max(map(max, found)) < 1e-5, found
