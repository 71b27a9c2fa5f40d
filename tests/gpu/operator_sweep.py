"""Measures the errors of `meta_linear_attention`'s Triton backend against float64, for every kernel
configuration."""

from __future__ import annotations

import math
import traceback
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch

from megatron_patch.ops import meta_linear_attention, torch_ops
from tests.ops.cases import evaluate, make, relative_error

HEADS = 8
# K and V of heads: V = 2 K as by default, then other `expand_k`: K = V for 1.0, K = 2 V for 2.0.
WIDTHS = [(32, 64), (64, 128), (96, 192), (128, 256), (48, 96), (256, 512), (40, 80), (36, 72)]
WIDTHS += [(k, k) for k in (16, 32, 40, 64, 96, 128, 256)] + [(16, 32), (64, 32), (128, 64)]
WIDTHS += [(8, 8), (8, 16)]  # narrower than the tiles of 16
# The widths that are measured in every dtype, not in bfloat16 alone.
IN_ALL_DTYPES = [(8, 16), (16, 32), (64, 128), (128, 256), (40, 80)]
IN_ALL_DTYPES += [(k, k) for k in (8, 16, 40, 64, 128)]
LENGTHS = [17, 300, 2500]
KINDS = ("plain", "state", "packed", "strong gates", "mixed gates")
# With one draw of few tokens, chance decides which of two forms is nearer to float64. So a case has
# at least DRAWS draws, and enough of them for TOKENS tokens in all.
DRAWS, TOKENS = 9, 800
# The kernels' error is compared with that of chunked PyTorch, or with the roundoff of float32, in
# which sums are computed, if that is larger.
ROUNDOFF = 2.0**-24
UNCHECKED = 4  # tokens at the start of a sequence that has no state before it


class Case(NamedTuple):
    k: int
    v: int
    dtype: torch.dtype
    length: int
    kind: str

    def __str__(self) -> str:
        return f"{self.k}-{self.v}-{str(self.dtype)[6:]}-{self.length}-{self.kind}"


class Errors(NamedTuple):
    """Relative errors of a case, in the 2-norm; the largest over outputs and gradients.

    Attributes:
        median: over the draws.
        worst: over the draws. Some draws are ill-conditioned, for any rounding.
        ratio: of the medians to those of chunked PyTorch, whose products take operands of the same
            dtype.
        bits_equal: whether two runs gave the same bits in every draw.
        failure: the traceback of an exception, such as an illegal access; otherwise empty.
    """

    median: float = math.nan
    worst: float = math.nan
    ratio: float = math.nan
    bits_equal: bool = False
    failure: str = ""


CASES = [
    Case(k, v, dtype, length, kind)
    for k, v in WIDTHS
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for length in LENGTHS
    for kind in KINDS
    # The rarer kinds at two lengths.
    if length in (300, 2500) or kind in ("plain", "state")
    if dtype == torch.bfloat16 or (k, v) in IN_ALL_DTYPES
]


def measure_group(cases: list[Case]) -> list[Errors]:
    """Measures cases of one kernel configuration, so that one process compiles it once."""
    # Fills what `torch.empty` returns with NaN: an element that no kernel writes shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    return [measure(case) for case in cases]


def measure(case: Case) -> Errors:
    try:
        generator = torch.Generator("cuda").manual_seed(0)
        count = max(DRAWS, TOKENS // case.length)
        draws = [errors_of_a_draw(case, generator) for _ in range(count)]
        torch.cuda.synchronize()
    except Exception:  # an illegal access ends the process: the cases after it fail too
        return Errors(failure=traceback.format_exc())
    errors = torch.tensor([found for _, found in draws], dtype=torch.float64)  # [draws, results, 2]
    kernels, baseline = errors.median(0).values.unbind(1)
    return Errors(
        median=kernels.max().item(),
        worst=errors[:, :, 0].max().item(),
        ratio=(kernels / baseline.clamp_min(ROUNDOFF)).max().item(),
        bits_equal=all(same for same, _ in draws),
    )


def errors_of_a_draw(case: Case, generator: torch.Generator) -> tuple[bool, list[list[float]]]:
    """Evaluates random inputs.

    Returns:
        Whether two runs of the kernels give the same bits, and for each result the relative errors
        of the kernels and of chunked PyTorch with operands of the same dtype.
    """
    k, v, dtype, length, kind = case
    arguments: dict = {"output_final_state": kind != "plain"}
    sequences = 1
    if kind == "packed":
        ends = sorted({0, length // 3, length // 3 + 1, length})
        arguments["cu_seqlens"] = torch.tensor([0, *ends], device="cuda")
        sequences = len(ends)
    tensors = make(
        1, length, HEADS, k, v, N=sequences, dtype=dtype, generator=generator,
        gates=1e4 if kind == "strong gates" else 1.0,
        absent=("initial_state",) if kind == "plain" else (),
    )  # fmt: skip
    if kind == "mixed gates":
        tensors["gate_logits"][:, : length // 2, 0] *= 1e3
    shapes = [(1, length, HEADS, v), (sequences, HEADS, k, v)][: 1 if kind == "plain" else 2]
    weights = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    weights[0] = weights[0].bfloat16()
    if kind == "plain":
        # Without a state before it, a first token's y is alpha v + sigmoid(beta v), which can be
        # all but constant over a head. LayerNorm then magnifies any rounding up to 300 times, and
        # so it can for the next few tokens. The other kinds have a state and check these too.
        weights[0][:, :UNCHECKED] = 0

    def run(operator, dtype=None):
        return evaluate(operator, tensors, dtype, weights, **arguments)

    chunked = partial(meta_linear_attention, backend="chunked")
    found, again = (run(partial(meta_linear_attention, backend="triton")) for _ in range(2))
    baseline = run(chunked_in_bfloat16 if dtype == torch.bfloat16 else chunked)
    wanted = run(chunked, torch.float64)
    same = all(torch.equal(found[name], again[name]) for name in found)
    if kind == "plain":
        for results in (found, baseline, wanted):
            results["out"] = results["out"][:, UNCHECKED:]
    errors = []
    for name, want in wanted.items():
        results = found[name], baseline[name]
        if want.norm().item() <= 1e-5 * want.numel() ** 0.5:
            # A result that is zero up to rounding has no relative error; it must be finite.
            errors.append([0.0 if x.isfinite().all() else math.nan for x in results])
        else:
            errors.append([relative_error(x, want) for x in results])
    return same, errors


def chunked_in_bfloat16(**arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs chunked PyTorch with products of bfloat16 operands, like the kernels'."""
    numbers = {"tau": 16.0, "scale": arguments["q"].shape[-1] ** -0.5, "norm_eps": 1e-5}
    with (
        mock.patch.object(torch_ops, "without_autocast", lambda device: nullcontext()),
        torch.autocast("cuda", torch.bfloat16),
    ):
        return torch_ops.meta_linear_attention(**arguments, **numbers)
