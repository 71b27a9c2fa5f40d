"""The chunk kernels against chunked PyTorch in float64: on a GPU, or on small shapes in Triton's
interpreter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_patch.ops import meta_linear_attention
from megatron_patch.ops.joined import split_joined
from megatron_patch.ops.triton.config import configure
from megatron_patch.ops.triton.tiles import prepare_chunk_indices
from tests.ops import cases
from tests.ops.cases import DEVICE, NAMES, WITHOUT, make

# Relative errors (2-norm). Triton's interpreter cuts digits off where a GPU rounds to bfloat16.
TOLERANCE = {
    torch.float32: 3e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2 if DEVICE == "cuda" else 2e-2,
}


def evaluate(tensors, backend, dtype=None, **arguments):
    return cases.evaluate(meta_linear_attention, tensors, dtype, backend=backend, **arguments)


def assert_right(tensors, tolerance=None, backend_of_oracle="chunked", **arguments):
    arguments.setdefault("output_final_state", True)
    dtype = tensors["q"].dtype
    found = evaluate(tensors, "triton", **arguments)
    wanted = evaluate(tensors, backend_of_oracle, torch.float64, **arguments)
    for name, want in wanted.items():
        assert found[name].shape == want.shape, name
        if want.norm() > 0:
            error = ((found[name].double() - want).norm() / want.norm()).item()
            assert error <= (tolerance or TOLERANCE[dtype]), (name, error)


# V is at least 16, because LayerNorm over two entries or fewer is ill-conditioned.
@pytest.mark.parametrize("T", [*range(1, 18), 31, 32, 33, 64, 65])
def test_every_length(T):
    assert_right(make(1, T, 2, 16, 16))


@pytest.mark.parametrize(
    ("K", "V"), [(1, 16), (7, 24), (16, 64), (24, 33), (32, 64), (48, 96), (64, 128), (130, 40)]
)
def test_every_width(K, V):
    assert_right(make(1, 19, 1, K, V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("K", "V"),
    [(16, 16), (16, 32), (32, 32), (64, 64), (128, 128), (32, 16), (64, 32), (128, 64)],
)
def test_keys_as_wide_as_values_and_wider(K, V, dtype):
    """Covers two chunks with a state, and several tiles of K (K = 128 in bfloat16)."""
    assert_right(make(1, 70, 1, K, V, dtype=dtype), backend_of_oracle="reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "K", "V"), [(5, 16, 32), (70, 32, 64), (130, 64, 32)])
def test_half_precision(dtype, T, K, V):
    assert_right(make(1, T, 1, K, V, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("K", "V"), [(16, 32), (64, 128), (128, 32)])
@pytest.mark.parametrize("kind", ["plain", "packed", "fallback"])
def test_gradients_of_one_projection_are_written_side_by_side(K, V, dtype, kind):
    """With the bits of gradients that are written apart. Covers several tiles of K."""
    is_rare = kind != "plain" and (K != 16 or dtype != torch.bfloat16)
    if DEVICE == "cpu" and (is_rare or dtype == torch.float16):
        pytest.skip("takes long in the interpreter")
    generator = torch.Generator().manual_seed(0)
    widths, arguments = [K, K, V, V], {"backend": "triton"}
    projection = torch.randn(1, 70, 2 * sum(widths), generator=generator)
    if kind == "fallback":
        projection.view(1, 70, 2, -1)[..., 0, K : 2 * K] *= 1e3
    if kind == "packed":
        arguments["cu_seqlens"] = torch.tensor([0, 5, 5, 37, 70], device=DEVICE)
    aug, bias, d_out = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype)
        for shape in ((2, K), (2, V), (1, 70, 2, V))
    )
    results, addresses = [], []
    for split in (split_joined, lambda x, widths: x.split(widths, dim=-1)):
        leaf = projection.to(DEVICE, dtype).requires_grad_()
        q, gate_logits, v, out_gate = split(leaf.unflatten(-1, (2, -1)), widths)
        q.register_hook(lambda d_q: addresses.append(d_q.data_ptr()))
        out, _ = meta_linear_attention(
            q, gate_logits, v, aug, out_gate, out_gate_bias=bias, **arguments
        )
        results.append((out, *torch.autograd.grad(out, leaf, d_out)))
    assert all(map(torch.equal, *results))
    assert addresses[0] == results[0][1].data_ptr()


@pytest.mark.parametrize("absent", WITHOUT, ids="+".join)
@pytest.mark.parametrize("output_final_state", [False, True])
def test_without_options(absent, output_final_state):
    tensors = make(2, 37, 1, 16, 32, absent=absent)
    assert_right(tensors, output_final_state=output_final_state, tau=2.5, scale=-0.3, norm_eps=1e-3)


@pytest.mark.parametrize("boundaries", [[0, 40], [0, 5, 5, 37, 40], [0, 0, 1, 39, 40, 40]])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_packed_sequences(boundaries, integer):
    cu_seqlens = torch.tensor(boundaries, dtype=integer, device=DEVICE)
    tensors = make(1, 40, 1, 16, 32, N=len(boundaries) - 1)
    assert_right(tensors, cu_seqlens=cu_seqlens)


def test_boundaries_with_gaps_in_memory():
    table = torch.tensor([[0, 3], [4, 9], [20, 0]], dtype=torch.int32, device=DEVICE)
    assert_right(make(1, 20, 1, 16, 32, N=2), cu_seqlens=table[:, 0])


def test_many_segments(monkeypatch):
    segment = 128
    monkeypatch.setattr(
        "megatron_patch.ops.triton.config.configure",
        lambda *widths: configure(*widths)._replace(segment=segment),
    )
    assert_right(make(1, segment + 70, 1, 16, 16))
    bounds = torch.tensor([0, 30, segment + 60, segment + 70], device=DEVICE)
    assert_right(make(1, segment + 70, 1, 16, 16, N=3), cu_seqlens=bounds)


@pytest.mark.parametrize(
    ("K", "absent", "boundaries"),
    [(72, (), None), (72, ("aug",), None), (72, (), [0, 9, 10, 70]), (130, (), None)],
)
def test_wide_heads(K, absent, boundaries):
    """Covers the two-kernel backward pass, and the fallback path where one sequence has strong
    decays."""
    assert configure(K, 40, torch.bfloat16).bwd_k < K
    N = 1 if boundaries is None else len(boundaries) - 1
    tensors = make(1, 70, 2, K, 40, N=N, dtype=torch.bfloat16, absent=absent)
    bounds = None
    if boundaries is not None:
        bounds = torch.tensor(boundaries, device=DEVICE)
        tensors["gate_logits"][:, : boundaries[1], 1] *= 1e3
    assert_right(tensors, cu_seqlens=bounds)


@pytest.mark.parametrize("gates", [30.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_any_size(gates, dtype):
    """Covers the fallback path alone, and beside the fast path in one sequence."""
    tensors = make(1, 40, 2, 16, 32, dtype=dtype, gates=gates)
    assert_right(tensors)
    tensors["gate_logits"][:, :, 1] *= 1e-3 / gates
    # These inputs are ill-conditioned: perturbing q and v by half a bfloat16 roundoff changes the
    # float64 d q by 6.5e-3, six times as much as with gates of unit size.
    tolerance = max(TOLERANCE[dtype], 1.5e-2) if dtype == torch.bfloat16 else None
    assert_right(tensors, tolerance, tau=1.0)


@pytest.mark.parametrize("gate", [-1e4, 1e4])
def test_gates_at_the_bounds(gate):
    tensors = make(1, 40, 1, 16, 32)
    tensors["gate_logits"].fill_(gate)
    found = evaluate(tensors, "triton", output_final_state=True)
    wanted = evaluate(tensors, "chunked", torch.float64, output_final_state=True)
    for name, want in wanted.items():
        assert torch.isfinite(found[name]).all(), name
        assert torch.allclose(found[name].double(), want, rtol=1e-4, atol=1e-4), name


def test_strided_inputs_are_read_where_they_lie():
    B, T, H, K, V = 2, 37, 2, 16, 32
    dense = make(B, T, H, K, V)
    # Slices of one time-first projection, head by head, as in the NeoX layer.
    fused = torch.cat([dense[name] for name in ("q", "gate_logits", "v", "out_gate")], -1)
    fused = fused.transpose(0, 1).contiguous().transpose(0, 1)
    slices = fused.split([K, K, V, V], -1)
    strided = dense | dict(zip(("q", "gate_logits", "v", "out_gate"), slices, strict=True))
    with torch.no_grad():
        found = meta_linear_attention(**strided, backend="triton")[0]
        wanted = meta_linear_attention(**dense, backend="triton")[0]
    assert torch.equal(found, wanted)
    x = fused.clone().requires_grad_()
    # With an initial state: without one, LayerNorm may magnify the rounding of the first token.
    names = ("aug", "out_gate_bias", "initial_state")
    arguments = {name: x for name, x in dense.items() if name in names}

    def loss(backend):
        q, gate_logits, v, out_gate = x.split([K, K, V, V], -1)
        out, _ = meta_linear_attention(
            q, gate_logits, v, out_gate=out_gate, backend=backend, **arguments
        )
        # This makes the gradient of `out` strided too.
        return torch.autograd.grad((out.transpose(1, 2) * 0.5).square().sum(), x)[0]

    assert torch.allclose(loss("triton"), loss("chunked"), rtol=1e-4, atol=1e-5)


def test_a_last_stride_other_than_one_changes_nothing():
    """The kernels assume a last stride of 1, so the host code copies such tensors."""
    dense = make(2, 37, 2, 16, 32)
    strided = {name: x.mT.contiguous().mT for name, x in dense.items()}
    wanted, found = (evaluate(x, "triton", output_final_state=True) for x in (dense, strided))
    assert all(torch.equal(found[name], want) for name, want in wanted.items())


def test_two_runs_have_equal_bits_and_inputs_stay():
    tensors = make(1, 70, 2, 16, 32)
    before = {name: x.clone() for name, x in tensors.items()}
    first = evaluate(tensors, "triton", output_final_state=True)
    second = evaluate(tensors, "triton", output_final_state=True)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], x) for name, x in tensors.items())


@pytest.mark.parametrize(("K", "dtype"), [(16, torch.float32), (72, torch.bfloat16)])
def test_a_retained_graph_gives_the_same_gradients_again(K, dtype):
    """Gradients reuse the memory of saved tensors, but not under `retain_graph`."""
    tensors = make(1, 40, 1, K, 32, dtype=dtype)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out, _ = meta_linear_attention(**leaves, backend="triton")
    kept = {x.data_ptr() for x in out.grad_fn.saved_tensors if x is not None}
    weight = torch.randn_like(out)
    first, second = (
        torch.autograd.grad(out, list(leaves.values()), weight, retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    assert not kept & {x.data_ptr() for x in first}
    last = torch.autograd.grad(out, list(leaves.values()), weight)
    assert all(map(torch.equal, first, last))
    d_q, d_gate_logits = last[:2]
    assert {d_q.data_ptr(), d_gate_logits.data_ptr()} <= kept


def test_state_continues_a_sequence():
    whole = make(1, 40, 1, 16, 32, absent=("initial_state",))
    parts, state = [], None
    with torch.no_grad():
        for span in (slice(0, 33), slice(33, 39), slice(39, 40)):
            part = {
                name: x if name in ("aug", "out_gate_bias") else x[:, span]
                for name, x in whole.items()
            }
            out, state = meta_linear_attention(
                **part, initial_state=state, output_final_state=True, backend="triton"
            )
            parts.append(out)
        wanted, _ = meta_linear_attention(**whole, backend="triton")
    assert torch.allclose(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-5)


def test_operator_check():
    from megatron_patch.ops.triton.chunk import _forward

    for absent in ((), ("initial_state", "aug")):
        x = make(1, 5, 1, 16, 16, absent=absent)
        x = {name: value.requires_grad_() for name, value in x.items()}
        arguments = (*(x.get(name) for name in NAMES), None, 16.0, 0.25, 1e-5, True)
        torch.library.opcheck(_forward, (*arguments, True))
    with torch.no_grad():
        torch.library.opcheck(_forward, (*arguments, False))


def test_compiled_as_eager():
    tensors = make(2, 37, 1, 16, 32)
    tensors["initial_state"].mul_(0.5)

    def run(function):
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        out, state = function(**leaves)
        return [out, *torch.autograd.grad(out.sum() + state.square().sum(), leaves.values())]

    def operator(**leaves):
        return meta_linear_attention(**leaves, output_final_state=True, backend="triton")

    wanted = run(operator)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, run(compiled), wanted))


def test_non_finite_inputs_are_not_hidden():
    for name in ("q", "gate_logits", "v"):
        tensors = make(1, 20, 1, 16, 32)
        tensors[name][0, 3] = math.nan
        with torch.no_grad():
            out, _ = meta_linear_attention(**tensors, backend="triton")
        assert out[0, 3].isnan().all(), name


def test_chunk_indices_of_packed_sequences():
    bounds = torch.tensor([0, 0, 5, 70, 200], device=DEVICE)
    indices = prepare_chunk_indices(1, 200, 16, 64, bounds)
    lengths = [0, 5, 65, 130]
    wanted = [[n, i] for n, length in enumerate(lengths) for i in range(-(-length // 16))]
    chunks = indices.chunk_indices.tolist()
    assert chunks[: len(wanted)] == wanted
    assert all(row[0] == -1 for row in chunks[len(wanted) :])
    segments = [row for row in indices.segment_indices.tolist() if row[0] >= 0]
    assert segments == [[1, 0], [2, 0], [2, 1], [3, 0], [3, 1], [3, 2]]
    assert indices.chunk_offsets.tolist() == [0, 0, 1, 6, 15]
    assert indices.segment_offsets.tolist() == [0, 0, 1, 3, 6]


def test_chunk_indices_of_many_packed_sequences():
    """More than the 256 that a program reads at once, as in a packed batch of short documents."""
    lengths = torch.randint(0, 40, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    bounds = torch.tensor([0, *np.cumsum(lengths)], device=DEVICE, dtype=torch.int32)
    indices = prepare_chunk_indices(1, sum(lengths), 16, 64, bounds)
    pairs = (
        (16, indices.chunk_indices, indices.chunk_offsets),
        (64, indices.segment_indices, indices.segment_offsets),
    )
    for size, found, offsets in pairs:
        counts = [-(-length // size) for length in lengths]
        wanted = [[n, i] for n, count in enumerate(counts) for i in range(count)]
        assert found[: len(wanted)].tolist() == wanted
        assert (found[len(wanted) :, 0] == -1).all()
        assert offsets.tolist() == [0, *np.cumsum(counts)]


def test_who_looks_at_operators_finds_one():
    """`vmap` and `make_fx` on plain tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        make(1, 20, 1, 16, 32, absent=("initial_state",), generator=generator) for _ in range(2)
    ]
    stacked = [torch.stack(parts) for parts in zip(*(t.values() for t in tensors), strict=True)]

    def mix(*parts):
        named = dict(zip(tensors[0], parts, strict=True))
        return meta_linear_attention(**named, backend="triton")[0]

    wanted = torch.stack([mix(*t.values()) for t in tensors])
    assert torch.equal(torch.vmap(mix)(*stacked), wanted)
    assert "metala.forward" in make_fx(mix)(*tensors[0].values()).code
