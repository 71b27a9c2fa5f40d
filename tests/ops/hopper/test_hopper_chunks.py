"""Hopper's chunk kernels: they compile, they say which tensors they serve, and on a GPU their
results are those of the Triton kernels that serve elsewhere. Both are checked against float64 as
well, in tests/ops/triton and by the correctness sweep on a GPU."""

import pytest
import torch

from megatron_patch.ops import meta_linear_attention
from megatron_patch.ops.backends import import_failure

if import_failure("megatron_patch.ops.hopper.nvrtc") is not None:
    pytest.skip("cuda-bindings is not installed", allow_module_level=True)
from megatron_patch.ops.hopper import chunk_bwd, chunk_fwd_o, launch
from megatron_patch.ops.hopper.nvrtc import compile_code, known_architectures

COMPILER = pytest.mark.skipif(
    90 not in known_architectures(), reason="NVIDIA's runtime compiler is not installed"
)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GPU = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")


WIDTHS = [(64, 128), (48, 96), (8, 16), (128, 256), (72, 144), (96, 32), (32, 256)]
WIDTHS += [(64, 64), (128, 128), (128, 64)]


def compile_for(source, blocks, heads, k, v, **macros):
    return compile_code(
        source, "sm_90a", BLOCKS=blocks, SHARED=launch.shared_bytes(blocks), H=heads, K=k, V=v,
        **macros,
    )  # fmt: skip


@COMPILER
@pytest.mark.parametrize("aug_bytes, cu_seqlens_bytes", [(0, 0), (2, 4), (4, 8)])
@pytest.mark.parametrize("k, v", [*WIDTHS, (16, 320)])
def test_gradients_compile(k, v, aug_bytes, cu_seqlens_bytes):
    code = compile_for(
        chunk_bwd.SOURCE, chunk_bwd.BLOCKS, 3, k, v, AUG=aug_bytes, CU_SEQLENS=cu_seqlens_bytes,
        D_K=2 * (k + v), D_V=2 * (k + v),
    )  # fmt: skip
    assert code.startswith(b"\x7fELF")


@COMPILER
@pytest.mark.parametrize(
    "aug, gate_bytes, bias_bytes, keep, cu_seqlens_bytes",
    [(0, 0, 0, 0, 0), (1, 2, 0, 0, 8), (1, 2, 2, 1, 0), (0, 2, 4, 1, 4)],
)
@pytest.mark.parametrize("k, v", WIDTHS)
def test_outputs_compile(k, v, aug, gate_bytes, bias_bytes, keep, cu_seqlens_bytes):
    code = compile_for(
        chunk_fwd_o.SOURCE, chunk_fwd_o.blocks_for(k, v), 3, k, v,
        AUG=aug, GATE=gate_bytes, BIAS=bias_bytes, KEEP=keep, CU_SEQLENS=cu_seqlens_bytes,
    )  # fmt: skip
    assert code.startswith(b"\x7fELF")


def tensors(k=64, v=128, dtype=torch.bfloat16, time=5, device="cpu"):
    def random(width):
        return torch.randn(2, time, 3, width, dtype=dtype, device=device)

    return dict(q=random(k), gate_logits=random(k), v=random(v))


def sliced(x, first):
    """Returns x as a slice of a wider projection."""
    wide = x.new_empty(*x.shape[:3], x.shape[3] + 16)[..., first : first + x.shape[3]]
    return wide.copy_(x)


def test_which_gradients_fit(monkeypatch):
    aug = torch.zeros(3, 64)

    def fits(aug=aug, chunk=64, **change):
        return chunk_bwd.fits(**{**tensors(), **change}, aug=aug, chunk=chunk)

    assert not fits()  # on the CPU
    monkeypatch.setattr(launch, "_is_hopper", lambda device: True)
    assert fits() and fits(aug=None) and fits(aug=aug.bfloat16())
    assert fits(v=sliced(tensors()["v"], 8))
    assert not fits(aug=aug.half())
    assert not fits(chunk=32)
    for widths in (dict(k=136), dict(k=36), dict(v=100), dict(dtype=torch.float16)):
        assert not fits(**tensors(**widths))
    q = tensors()["q"]
    assert not fits(q=sliced(q, 4))  # not at a multiple of 16 bytes
    assert not fits(q=q.transpose(2, 3).contiguous().transpose(2, 3))


def test_which_outputs_fit(monkeypatch):
    bias = torch.zeros(3, 128)

    def fits(k=64, v=128, out_gate=True, bias=bias, chunk=64):
        made = tensors(k, v)
        gate = made["v"].clone() if out_gate is True else out_gate
        return chunk_fwd_o.fits(made["q"], made["v"], gate, bias, chunk)

    assert not fits()  # on the CPU
    monkeypatch.setattr(launch, "_is_hopper", lambda device: True)
    assert fits() and fits(out_gate=None, bias=None) and fits(bias=bias.bfloat16())
    gate = tensors()["v"]
    assert fits(out_gate=sliced(gate, 8))
    assert not fits(out_gate=sliced(gate, 4))
    assert not fits(k=36, v=72, bias=None)  # rows of qg and kg would not be whole vectors
    assert not fits(bias=bias.half())
    assert not fits(k=136) and not fits(v=264) and not fits(v=100) and not fits(chunk=32)


@GPU
@pytest.mark.parametrize("k, v", WIDTHS)
@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "strided",
        "joined",
        "bfloat16",
        "no aug",
        "no bias",
        "no gate",
        "packed",
        "long",
        "fallback",
    ],
)
def test_results_are_those_of_the_triton_kernels(kind, k, v, monkeypatch):
    from megatron_patch.ops.triton import chunk

    torch.manual_seed(0)
    time = 1000 if kind == "long" else 150
    arguments = tensors(k, v, time=time, device="cuda")
    parameters = dict(aug=torch.randn(3, k, device="cuda"))
    if kind != "no gate":
        arguments["out_gate"] = torch.randn_like(arguments["v"])
        if kind != "no bias":
            parameters["out_gate_bias"] = torch.randn(3, v, device="cuda")
    if kind == "packed":
        arguments = {name: x.reshape(1, 2 * time, 3, -1) for name, x in arguments.items()}
        arguments["cu_seqlens"] = torch.tensor(
            [0, 1, 130, 130, 290], device="cuda", dtype=torch.int32
        )
    if kind == "fallback":  # the scores of the first head do not factor
        arguments["gate_logits"][:, :, 0] *= 1e3
    if kind == "no aug":
        del parameters["aug"]
    if kind == "bfloat16":
        parameters = {name: x.bfloat16() for name, x in parameters.items()}
    # With an initial state, because LayerNorm magnifies the rounding of a first token without one.
    sequences = 4 if kind == "packed" else 2
    arguments |= parameters | dict(initial_state=torch.randn(sequences, 3, k, v, device="cuda"))
    if kind == "joined":
        together = ("q", "gate_logits", "v", "out_gate")
        parts = [arguments[name] for name in together]
        whole = torch.cat(parts, dim=3).split([part.shape[3] for part in parts], dim=3)
        arguments |= dict(zip(together, whole, strict=True))
    names = [name for name in arguments if name != "cu_seqlens"]
    weight = torch.randn_like(arguments["v"])
    launched = []
    original = launch.launch
    monkeypatch.setattr(launch, "launch", lambda *how: (launched.append(1), original(*how)))

    def run():
        leaves = {
            name: (sliced(x, 8) if kind == "strided" and x.dtype == torch.bfloat16 else x)
            .detach()
            .requires_grad_()
            for name, x in arguments.items()
            if name in names
        }
        out, _ = meta_linear_attention(**{**arguments, **leaves}, backend="triton")
        with torch.no_grad():
            alone, _ = meta_linear_attention(**{**arguments, **leaves}, backend="triton")
        return [out, alone, *torch.autograd.grad(out, leaves.values(), weight)]

    first, second = run(), run()
    assert len(launched) == 6 and all(map(torch.equal, first, second))
    assert torch.equal(first[0], first[1])
    monkeypatch.setattr(chunk, "hopper_chunks", lambda *call: False)
    for name, found, wanted in zip(["out", "alone", *names], first, run(), strict=True):
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        # A parameter has few gradients, of which many can round to a neighbouring bfloat16.
        limit = 2**-8 if name in parameters and kind == "bfloat16" else 5e-4
        assert error < limit, (name, error)
    assert len(launched) == 6
