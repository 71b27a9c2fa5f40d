"""A chunk's gradients in CUDA C++: that they compile, for what, and on a GPU that they are those of
Triton's kernel, which serves elsewhere. Both meet the same checks against float64, in
tests/ops/triton and by scripts/benchmark_ops.py."""

import pytest
import torch

from megatron_patch.ops import meta_linear_attention
from megatron_patch.ops.availability import CUDA_BINDINGS_INSTALLED

if not CUDA_BINDINGS_INSTALLED:
    pytest.skip("cuda-bindings is not installed", allow_module_level=True)
from megatron_patch.ops.cuda.compilation import compile_code, known_architectures
from megatron_patch.ops.cuda.gradients import gradients

COMPILER = pytest.mark.skipif(
    90 not in known_architectures(), reason="NVIDIA's runtime compiler is not installed"
)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GPU = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")


@COMPILER
@pytest.mark.parametrize("bound_bytes", [0, 4, 8])
@pytest.mark.parametrize("aug_bytes", [0, 2, 4])
@pytest.mark.parametrize(
    "heads, k, v",
    [(8, 64, 128), (8, 128, 256), (1, 32, 64), (3, 40, 80), (2, 96, 192), (7, 8, 16), (1, 16, 320)],
)
def test_it_compiles(heads, k, v, aug_bytes, bound_bytes):
    code = compile_code(
        gradients.SOURCE, "sm_90a", H=heads, K=k, V=v, AUG=aug_bytes, BOUND=bound_bytes
    )
    assert code.startswith(b"\x7fELF")


def tensors(k=64, v=128, dtype=torch.bfloat16, time=5, device="cpu"):
    def random(width):
        return torch.randn(2, time, 3, width, dtype=dtype, device=device)

    return dict(q=random(k), gate_logits=random(k), v=random(v))


def sliced(x, first):
    """The same numbers as a slice of a wider projection."""
    wide = x.new_empty(*x.shape[:3], x.shape[3] + 16)[..., first : first + x.shape[3]]
    return wide.copy_(x)


def test_what_fits(monkeypatch):
    aug = torch.zeros(3, 64)

    def fits(aug=aug, chunk=64, **change):
        return gradients.fits(**{**tensors(), **change}, aug=aug, chunk=chunk)

    assert not fits()  # on the CPU
    monkeypatch.setattr(gradients, "_is_hopper", lambda device: True)
    assert fits() and fits(aug=None) and fits(aug=aug.bfloat16())
    assert fits(v=sliced(tensors()["v"], 8))
    assert not fits(aug=aug.half())
    assert not fits(chunk=32)
    for widths in (dict(k=136), dict(k=36), dict(v=100), dict(dtype=torch.float16)):
        assert not fits(**tensors(**widths))
    q = tensors()["q"]
    assert not fits(q=sliced(q, 4))  # not at a multiple of 16 bytes
    assert not fits(q=q.transpose(2, 3).contiguous().transpose(2, 3))


WIDTHS = [(64, 128), (48, 96), (8, 16), (128, 256), (72, 144), (96, 32), (32, 256)]


@GPU
@pytest.mark.parametrize("k, v", WIDTHS)
@pytest.mark.parametrize("kind", ["plain", "strided", "float32 aug", "no aug", "packed", "long"])
def test_they_are_those_of_tritons_kernel(kind, k, v, monkeypatch):
    from megatron_patch.ops.triton import launches

    torch.manual_seed(0)
    time = 1000 if kind == "long" else 150
    arguments = tensors(k, v, time=time, device="cuda")
    if kind == "packed":
        arguments = {name: x.reshape(1, 2 * time, 3, -1) for name, x in arguments.items()}
        arguments["cu_seqlens"] = torch.tensor(
            [0, 1, 130, 130, 300], device="cuda", dtype=torch.int32
        )
    if kind != "no aug":
        aug = torch.randn(3, k, device="cuda")
        arguments["aug"] = aug if kind == "float32 aug" else aug.bfloat16()
    names = [name for name in arguments if name != "cu_seqlens"]
    weight = torch.randn_like(arguments["v"])
    launched = []
    launch = launches.cuda_gradients.launch
    monkeypatch.setattr(
        launches.cuda_gradients, "launch", lambda *how: (launched.append(1), launch(*how))
    )

    def run():
        leaves = {
            name: (sliced(x, 8) if kind == "strided" and name != "aug" else x.clone())
            .detach()
            .requires_grad_()
            for name, x in arguments.items()
            if name in names
        }
        out, _ = meta_linear_attention(**{**arguments, **leaves}, backend="triton")
        return torch.autograd.grad(out, leaves.values(), weight)

    first, second = run(), run()
    assert len(launched) == 2 and all(map(torch.equal, first, second))
    monkeypatch.setattr(launches, "CUDA_BINDINGS_INSTALLED", False)
    for name, found, wanted in zip(names, first, run(), strict=True):
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < 5e-4, (name, error)
    assert len(launched) == 2
