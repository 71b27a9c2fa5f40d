"""The chunked backend against the reference: equal in float64, as accurate in less."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_patch.ops import meta_linear_attention
from tests.ops import cases
from tests.ops.cases import largest_errors, make_leaves

EXACT = 1e-10
evaluate = partial(cases.evaluate, meta_linear_attention, output_final_state=True)


@pytest.mark.parametrize("T", [*range(1, 18), 63, 64, 65, 127, 128, 130])
def test_equals_reference_at_every_length(T):
    inputs = make_leaves(T=T)
    errors = largest_errors(
        evaluate(inputs, backend="chunked"), evaluate(inputs, backend="reference")
    )
    assert max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize(
    ("B", "T", "H", "K", "V"),
    [(1, 1, 1, 1, 2), (1, 70, 1, 8, 16), (3, 66, 5, 17, 33), (1, 65, 2, 48, 96), (2, 3, 1, 32, 7)],
)
def test_equals_reference_at_every_width(B, T, H, K, V):
    inputs = make_leaves(B, T, H, K, V)
    arguments = {"tau": 2.5, "scale": 0.3, "norm_eps": 1e-3}
    errors = largest_errors(
        evaluate(inputs, backend="chunked", **arguments),
        evaluate(inputs, backend="reference", **arguments),
    )
    assert max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize("T", [1, 9, 64, 100])
@pytest.mark.parametrize(
    "absent",
    [
        ["initial_state"],
        ["aug"],
        ["out_gate_bias"],
        ["out_gate", "out_gate_bias"],
        ["initial_state", "aug", "out_gate", "out_gate_bias"],
    ],
    ids="+".join,
)
def test_equals_reference_without_options(T, absent):
    inputs = {name: x for name, x in make_leaves(T=T).items() if name not in absent}
    for output_final_state in (False, True):
        errors = largest_errors(
            evaluate(inputs, backend="chunked", output_final_state=output_final_state),
            evaluate(inputs, backend="reference", output_final_state=output_final_state),
        )
        assert max(errors.values()) <= EXACT, errors


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 20), st.integers(2, 20)),
    T=st.integers(1, 150),
    gate_scale=st.sampled_from([0.1, 1.0, 100.0, 1e4]),
    tau=st.floats(0.1, 100),
    seed=st.integers(0, 1000),
)
def test_equals_reference_for_any_shape(sizes, T, gate_scale, tau, seed):
    B, H, K, V = sizes
    inputs = make_leaves(B, T, H, K, V, seed=seed)
    with torch.no_grad():
        inputs["gate_logits"] *= gate_scale
    # With few values per head a variance near zero amplifies rounding: keep the LayerNorm tame.
    arguments = {"tau": tau, "norm_eps": 1.0}
    found = evaluate(inputs, backend="chunked", **arguments)
    wanted = evaluate(inputs, backend="reference", **arguments)
    for name, error in largest_errors(found, wanted).items():
        # Gradients of saturated gates can be so small that only an absolute measure makes sense.
        assert error <= EXACT or (found[name] - wanted[name]).abs().max() <= EXACT, (name, error)


@st.composite
def boundaries(draw) -> list[int]:
    lengths = draw(st.lists(st.integers(0, 90), min_size=1, max_size=6).filter(any))
    return [sum(lengths[:n]) for n in range(len(lengths) + 1)]


@settings(max_examples=15, deadline=None)
@given(bounds=boundaries(), states=st.booleans())
def test_packed_equals_reference(bounds, states):
    inputs = make_leaves(1, bounds[-1], N=len(bounds) - 1, K=5, V=6)
    if not states:
        del inputs["initial_state"]
    arguments = {
        "cu_seqlens": torch.tensor(bounds),
        "output_final_state": states,
        "norm_eps": 1.0,
    }
    errors = largest_errors(
        evaluate(inputs, backend="chunked", **arguments),
        evaluate(inputs, backend="reference", **arguments),
    )
    assert max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("states", [False, True], ids=["stateless", "states"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_equals_separate_runs(backend, states, dtype):
    bounds = [0, 1, 1, 70, 71, 200, 200]
    inputs = make_leaves(1, bounds[-1], N=len(bounds) - 1)
    if not states:
        del inputs["initial_state"]
    packed = evaluate(
        inputs,
        backend=backend,
        cu_seqlens=torch.tensor(bounds, dtype=dtype),
        output_final_state=states,
    )
    for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if start == end:
            if states:  # an empty sequence hands its state on
                assert torch.equal(packed["final_state"][n], inputs["initial_state"][n])
            continue
        single = {
            name: x[:, start:end] if x.dim() == 4 and name != "initial_state" else x
            for name, x in inputs.items()
        }
        if states:
            single["initial_state"] = inputs["initial_state"][n : n + 1]
        out, state = meta_linear_attention(**single, backend=backend, output_final_state=states)
        torch.testing.assert_close(packed["out"][:, start:end], out, rtol=0, atol=1e-13)
        if states:
            torch.testing.assert_close(packed["final_state"][n], state[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("states", [False, True], ids=["stateless", "states"])
def test_packed_sequences_do_not_see_each_other(states):
    """The first sequence has enormous values and gates that are wide open."""
    inputs = make_leaves(1, 40, N=2)
    inputs["gate_logits"] = torch.full_like(inputs["gate_logits"], 50.0)
    inputs["gate_logits"][:, :5] = -50.0
    if not states:
        del inputs["initial_state"]
    arguments = {
        "cu_seqlens": torch.tensor([0, 20, 40]),
        "output_final_state": states,
        "backend": "chunked",
    }
    before, _ = meta_linear_attention(**inputs, **arguments)
    inputs["v"] = torch.cat([1e30 * inputs["v"][:, :20], inputs["v"][:, 20:]], 1)
    after, _ = meta_linear_attention(**inputs, **arguments)
    assert torch.equal(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("states", [False, True], ids=["stateless", "states"])
def test_thousands_of_packed_sequences_need_no_loop_over_them(states):
    """One long and 2,000 short sequences take as many steps as the longest has chunks."""
    bounds = torch.cat([torch.arange(0, 6000, 3), torch.tensor([6000, 6400])])
    inputs = make_leaves(1, 6400, 1, 4, 4, N=len(bounds) - 1, dtype=torch.float32)
    if not states:
        del inputs["initial_state"]
    with _Operations() as operations, torch.no_grad():
        meta_linear_attention(
            **inputs, cu_seqlens=bounds, output_final_state=states, backend="chunked"
        )
    assert operations.count < 1000


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("split", [1, 37, 64, 99])
def test_two_runs_with_carried_state_equal_one(backend, split):
    inputs = make_leaves(T=100)
    whole = meta_linear_attention(**inputs, output_final_state=True, backend=backend)
    state, outs = inputs["initial_state"], []
    for part in (slice(None, split), slice(split, None)):
        tokens = {name: inputs[name][:, part] for name in ("q", "gate_logits", "v", "out_gate")}
        out, state = meta_linear_attention(
            **{**inputs, **tokens, "initial_state": state},
            output_final_state=True,
            backend=backend,
        )
        outs.append(out)
    torch.testing.assert_close((torch.cat(outs, 1), state), whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_decoding_token_by_token_equals_the_whole_run(backend):
    inputs = make_leaves(T=70)
    whole = meta_linear_attention(**inputs, output_final_state=True, backend=backend)
    state, outs = inputs["initial_state"], []
    for t in range(70):
        tokens = {
            name: inputs[name][:, t : t + 1] for name in ("q", "gate_logits", "v", "out_gate")
        }
        out, state = meta_linear_attention(
            **{**inputs, **tokens, "initial_state": state},
            output_final_state=True,
            backend=backend,
        )
        outs.append(out)
    torch.testing.assert_close((torch.cat(outs, 1), state), whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("T", [1, 3])
def test_gradients(T):
    inputs = make_leaves(1, T, 1, 2, 3)

    def operator(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return meta_linear_attention(**named, output_final_state=True, backend="chunked")

    assert torch.autograd.gradcheck(operator, tuple(inputs.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("magnitude", [1e4, 3e38, math.inf])
def test_any_gate_logit_gives_finite_results(dtype, magnitude):
    """Each head has a pattern of its own over many chunks: shut, open, or both in turn."""
    patterns = [[-1.0], [1.0], [1.0, 1.0, -1.0], [1.0] * 100 + [-1.0] * 100]
    signs = torch.stack([torch.tensor(p).repeat(4096)[:4096] for p in patterns], -1)
    inputs = make_leaves(1, 4096, len(patterns), 2, 2, dtype=dtype)
    with torch.no_grad():
        inputs["gate_logits"].copy_(magnitude * signs[..., None])
    for name, result in evaluate(inputs, backend="chunked").items():
        assert result.isfinite().all(), name


@pytest.mark.parametrize("magnitude", [1e4, 200.0])
def test_equals_reference_at_extreme_gate_logits(magnitude):
    inputs = make_leaves(1, 150, 2, 4, 6)
    with torch.no_grad():
        inputs["gate_logits"] *= magnitude
    errors = largest_errors(
        evaluate(inputs, backend="chunked"), evaluate(inputs, backend="reference")
    )
    assert max(errors.values()) <= EXACT, errors


def test_float32_keeps_its_digits_beside_shut_gates():
    """A step of decay exp(-600) must not cost its neighbours their digits. It would if decays were
    differences of a running sum."""
    inputs = make_leaves(1, 256, 1, 8, 8)
    del inputs["initial_state"]  # which the first gate shuts out
    with torch.no_grad():
        inputs["gate_logits"] += 3
        inputs["gate_logits"][:, ::9] = -1e4
    exact = evaluate(inputs, backend="reference", norm_eps=1.0)
    single = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    errors = largest_errors(evaluate(single, backend="chunked", norm_eps=1.0), exact)
    assert max(errors.values()) <= 2e-6, errors


def test_float32_keeps_its_digits_over_a_long_sequence():
    """Decays close to one multiply over thousands of steps."""
    inputs = make_leaves(1, 4096, 1, 4, 4)
    with torch.no_grad():
        inputs["gate_logits"] += 8
    exact = evaluate(inputs, backend="chunked", norm_eps=1.0)
    single = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    errors = largest_errors(evaluate(single, backend="chunked", norm_eps=1.0), exact)
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]
)
@pytest.mark.parametrize("T", [1, 130])
def test_half_precision_is_one_rounding_from_float64(dtype, rounding, T):
    """All inner results are float32, so only the final ones are rounded."""
    inputs = make_leaves(T=T, dtype=dtype)
    found = evaluate(inputs, backend="chunked")
    exact = evaluate(
        {name: x.detach().double().requires_grad_() for name, x in inputs.items()},
        backend="reference",
    )
    assert found["out"].dtype == dtype
    assert found["final_state"].dtype == torch.float32
    for name, want in exact.items():
        atol = 1e-4 * want.abs().max().item()
        torch.testing.assert_close(found[name].double(), want, rtol=rounding, atol=atol)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("T", [1, 70])
def test_reads_any_strides(backend, T):
    """The NeoX layer hands over time-major slices of one projection. Bias and state are views
    too."""
    B, H, K, V = 3, 2, 8, 12
    generator = torch.Generator().manual_seed(2)
    shape = (T, B, H, 2 * K + 2 * V)
    projection = torch.randn(shape, generator=generator, dtype=torch.float64)
    slices = projection.transpose(0, 1).split([K, K, V, V], dim=-1)
    strided = dict(zip(["q", "gate_logits", "v", "out_gate"], slices, strict=True))
    inputs = make_leaves(B, T, H, K, V)
    strided["aug"] = inputs["aug"].detach().T.contiguous().T
    strided["initial_state"] = inputs["initial_state"].detach().mT.contiguous().mT
    assert not any(x.is_contiguous() for x in strided.values() if x.shape[1] > 1)
    kept = projection.clone()
    found = evaluate({n: x.detach().requires_grad_() for n, x in strided.items()}, backend=backend)
    wanted = evaluate(
        {n: x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
         for n, x in strided.items()},
        backend=backend,
    )  # fmt: skip
    assert torch.equal(projection, kept)
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("T", [1, 65])
@pytest.mark.parametrize("packed", [False, True])
def test_modifies_nothing(backend, T, packed):
    inputs = make_leaves(1, T)
    kept = {name: x.detach().clone() for name, x in inputs.items()}
    cu_seqlens = torch.tensor([0, T]) if packed else None
    _, state = meta_linear_attention(
        **inputs, backend=backend, cu_seqlens=cu_seqlens, output_final_state=True
    )
    evaluate(inputs, backend=backend, cu_seqlens=cu_seqlens)
    with torch.no_grad():
        state.zero_()  # the returned state does not share memory with the initial one
    for name, x in inputs.items():
        assert torch.equal(x, kept[name]), name


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_computes_in_float32_under_autocast(backend):
    inputs = make_leaves(T=70, dtype=torch.float32)
    wanted = meta_linear_attention(**inputs, output_final_state=True, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = meta_linear_attention(**inputs, output_final_state=True, backend=backend)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    inputs = make_leaves(T=70)

    def operator(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return meta_linear_attention(**named, backend="chunked")[0].square().sum()

    tensors = tuple(inputs.values())
    wanted = torch.autograd.grad(operator(*tensors), tensors)
    checkpoint(operator, *tensors, use_reentrant=use_reentrant).backward()
    for x, gradient in zip(tensors, wanted, strict=True):
        assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_graph_breaks(packed):
    inputs = make_leaves(1, 20)
    arguments = {"backend": "chunked"}
    if packed:
        del inputs["initial_state"]
        arguments |= {"cu_seqlens": torch.tensor([0, 7, 20])}

    def operator(named):
        return meta_linear_attention(**named, **arguments)[0]

    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(inputs), operator(inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    tensors = list(inputs.values())
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), tensors),
        torch.autograd.grad(wanted.square().sum(), tensors),
    )


class _Operations(TorchDispatchMode):
    """Counts operations and remembers the largest tensor that any of them returned."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.count += 1
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


def test_memory_grows_with_the_inputs_alone():
    """No intermediate of either pass is larger than the largest of v, the scores within chunks and
    the states at chunk ends. In particular none has time x chunk x key width entries."""
    T, K, V, chunk = 1024, 64, 128, 64
    inputs = make_leaves(1, T, 1, K, V, dtype=torch.float32)
    with _Operations() as operations:
        out, _ = meta_linear_attention(**inputs, backend="chunked")
        out.sum().backward()
    assert operations.largest <= max(T * V, T * chunk, T // chunk * K * V)


def test_a_decoding_step_takes_few_operations():
    inputs = make_leaves(1, 1, dtype=torch.float32)
    with _Operations() as operations, torch.no_grad():
        meta_linear_attention(**inputs, output_final_state=True, backend="chunked")
    assert operations.count <= 40
