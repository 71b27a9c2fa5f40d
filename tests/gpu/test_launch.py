"""Launches that call compiled kernels directly give the bits of Triton's own launches."""

from __future__ import annotations

import pytest
import torch
import triton

from megatron_patch.ops import meta_linear_attention, short_convolution, swiglu
from megatron_patch.ops.triton import launch
from tests.ops.cases import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def shifted(x: torch.Tensor, offset: int) -> torch.Tensor:
    """Returns a copy of x that starts `offset` elements behind an aligned address."""
    memory = x.new_empty(x.numel() + offset)[offset:].view(x.shape)
    assert memory.data_ptr() % 16 == offset * x.element_size() % 16
    return memory.copy_(x)


def sliced(x: torch.Tensor) -> torch.Tensor:
    """Returns a copy of x whose strides are odd, with the last one 1."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] + 3)[..., : x.shape[-1]].copy_(x)


def strides_of_one(x: torch.Tensor) -> torch.Tensor:
    """Returns x [1, T, 1, W] with a stride of 1 where a dimension has one entry."""
    return x.as_strided(x.shape, (1, x.stride(1), 1, 1))


# Calls that differ in what Triton compiles for: dtype, alignment, strides, number of tokens.
CALLS = {
    "aligned": ({}, lambda x: x),
    "other memory": ({}, torch.clone),
    "float32": (dict(dtype=FLOAT32), torch.clone),
    "one element behind": ({}, lambda x: shifted(x, 1)),
    "eight elements behind": ({}, lambda x: shifted(x, 8)),
    "odd strides": ({}, sliced),
    "strides of one": ({}, lambda x: strides_of_one(x) if x.dim() == 4 and x.shape[2] == 1 else x),
    "16 tokens": (dict(T=16), torch.clone),
    "17 tokens": (dict(T=17), torch.clone),
    "many segments": (dict(T=2500), torch.clone),
    "no state": (dict(absent=("initial_state",)), torch.clone),
    "K 128": (dict(K=128), torch.clone),
}


def arguments(T=64, K=64, dtype=BFLOAT16, **options) -> dict[str, torch.Tensor]:
    return make(1, T, 1, K, 2 * K, dtype=dtype, **options)


def results(name: str) -> list[torch.Tensor]:
    """Returns the outputs and gradients of the operator, the convolution and SwiGLU."""
    sizes, change = CALLS[name]
    leaves = {n: change(x).detach().requires_grad_() for n, x in arguments(**sizes).items()}
    out, state = meta_linear_attention(**leaves, output_final_state=True, backend="triton")
    gradients = torch.autograd.grad(out.sum() + state.sum(), leaves.values())
    x = leaves["v"][:, :, 0]
    weight = x.new_ones(x.shape[-1], 1, 4).requires_grad_()
    convolved = short_convolution(x, weight, backend="triton")[0]
    activated = swiglu(x, backend="triton")
    with torch.no_grad():  # one token has kernels of its own
        named = ("q", "gate_logits", "v", "out_gate")
        step = {n: x[:, :1] if n in named else x for n, x in leaves.items()}
        decoded = meta_linear_attention(**step, backend="triton")[0]
    others = torch.autograd.grad(convolved.sum() + activated.sum(), [leaves["v"], weight])
    return [out, state, *gradients, convolved, activated, decoded, *others]


def test_equal_bits_in_any_order(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_may_skip_binder", lambda kernel: False)
        wanted = {name: results(name) for name in CALLS}
    launched = []
    run = triton.JITFunction.run

    def counted(self, *arguments, **options):
        launched.append(options["warmup"])
        return run(self, *arguments, **options)

    monkeypatch.setattr(triton.JITFunction, "run", counted)
    for names in (CALLS, CALLS, reversed(CALLS), sorted(CALLS)):
        launched.clear()
        for name in names:
            found = results(name)
            assert all(map(torch.equal, found, wanted[name])), name
    assert False not in launched  # the last rounds were direct


def test_on_another_stream_and_in_a_graph():
    tensors = arguments(T=300, absent=("initial_state",))
    leaves = [x.requires_grad_() for x in tensors.values()]
    gradient = torch.randn_like(tensors["v"])

    def call():
        out, _ = meta_linear_attention(**tensors, backend="triton")
        # Detached: a graph kept alive remembers its stream, which a capture must not wait for.
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    call()
    wanted = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)  # a launch on another stream would not wait for these sums
        with torch.no_grad():
            for x in leaves:
                x.add_(1.0)
        found = call()
    torch.cuda.synchronize()
    changed = call()
    assert all(map(torch.equal, found, changed))
    assert not torch.equal(found[0], wanted[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    assert all(map(torch.equal, captured, changed))


def test_hooks_see_all_launches():
    tensors = arguments(dtype=FLOAT32)
    names = []

    def hook(metadata):
        names.append(metadata.get()["name"])

    with torch.no_grad():
        meta_linear_attention(**tensors, backend="triton")
        triton.knobs.runtime.launch_enter_hook.add(hook)
        try:
            meta_linear_attention(**tensors, backend="triton")
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert names == ["chunk_prepare_kernel", "chunk_h_kernel", "chunk_fwd_o_kernel"]
