"""The Triton backend of `short_convolution` against float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from megatron_patch.ops import short_convolution
from tests.ops.cases import evaluate, make_convolution, relative_error

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
LIMITS = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
KINDS = ("plain", "time-major", "state", "packed", "packed with state")
# dtype, channels, kernel size, kind: all kinds as models have them, and each dtype and kernel size.
CASES = [
    *product((torch.bfloat16,), (1000,), (4,), KINDS),
    *product((torch.bfloat16,), (37,), (2, 5), ("state", "packed")),
    *product((torch.float16, torch.float32), (1000,), (4,), ("time-major", "packed with state")),
]


@pytest.mark.parametrize("length", [3, 33, 300])
@pytest.mark.parametrize(("dtype", "channels", "kernel_size", "kind"), CASES, ids=str)
def test_equals_float64(dtype, channels, kernel_size, kind, length):
    packed, stateful = "packed" in kind, "state" in kind
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = make_convolution(
        1 if packed else 2, length, channels, kernel_size, N=4 if packed else None, dtype=dtype,
        time_major=kind == "time-major", absent=() if stateful else ("initial_state",),
        generator=generator,
    )  # fmt: skip
    arguments = {"output_final_state": stateful}
    if packed:
        cu_seqlens = [0, length // 3, length // 3, length // 2, length]
        arguments["cu_seqlens"] = torch.tensor(cu_seqlens, device="cuda")
    found, again = (
        evaluate(short_convolution, tensors, backend="triton", **arguments) for _ in range(2)
    )
    wanted = evaluate(short_convolution, tensors, torch.float64, backend="torch", **arguments)
    for name, want in wanted.items():
        assert relative_error(found[name], want) <= LIMITS[dtype], name
        assert torch.equal(found[name], again[name]), name
