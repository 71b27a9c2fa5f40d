"""The Triton backend of `meta_linear_attention` where offsets need more than 32 bits."""

from __future__ import annotations

import torch

from megatron_patch.ops import meta_linear_attention
from tests.ops.cases import make


def test_beyond_32_bits():
    """The end of a sequence of more than 2^31 values is, bit for bit, what the same tokens give
    alone from the state before them, because they lie in the same chunks."""
    heads, k, v, tail = 64, 64, 128, 4096
    length = 2**31 // (heads * v) + tail
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = make(
        1, length, heads, k, v, dtype=torch.bfloat16, absent=("initial_state",),
        generator=generator,
    )  # fmt: skip
    parameters = ("aug", "out_gate_bias")
    weights = torch.randn(1, tail, heads, v, device="cuda", generator=generator).bfloat16()

    def run(span: slice, **arguments):
        part = {n: x if n in parameters else x[:, span] for n, x in tensors.items()}
        value = part["v"] = part["v"].detach().requires_grad_(arguments.pop("gradient", False))
        out, state = meta_linear_attention(**part, backend="triton", **arguments)
        return out, state, value

    with torch.no_grad():
        state = run(slice(0, length - tail), output_final_state=True)[1]
    out, _, value = run(slice(length - tail, length), initial_state=state, gradient=True)
    wanted = [out, *torch.autograd.grad(out, value, weights)]
    out, _, value = run(slice(0, length), gradient=True)
    gradient = torch.zeros_like(out)
    gradient[:, -tail:] = weights
    found = [out, *torch.autograd.grad(out, value, gradient)]
    for x, want in zip(found, wanted, strict=True):
        assert torch.equal(x[:, -tail:], want)
