"""Kernels launch on the tensors' GPU, the second, while the first is the current one. Results are
compared with float64, as in the tests on one GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops import meta_linear_attention, short_convolution
from tests.ops import cases
from tests.ops.triton import test_triton_convolution, test_triton_mixer, test_triton_step

pytestmark = pytest.mark.usefixtures("two_gpus")
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def tensors_on_the_second_gpu(two_gpus, monkeypatch):
    monkeypatch.setattr(cases, "DEVICE", "cuda:1")
    assert torch.cuda.current_device() == 0
    yield
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator(dtype):
    tensors = test_triton_mixer.make(2, 200, 2, 64, 128, dtype=dtype)
    assert {str(x.device) for x in tensors.values()} == {"cuda:1"}
    test_triton_mixer.assert_right(tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_on_packed_sequences(dtype):
    bounds = torch.tensor([0, 70, 200], device="cuda:1")
    tensors = test_triton_mixer.make(1, 200, 2, 64, 128, N=2, dtype=dtype)
    test_triton_mixer.assert_right(tensors, cu_seqlens=bounds)


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution(dtype):
    tensors = test_triton_convolution.make(2, 200, 96, dtype=dtype)
    test_triton_convolution.assert_right(tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_steps(dtype):
    tolerance = test_triton_step.TOLERANCE[dtype]
    attention = test_triton_step.make(2, 2, 64, 128, dtype=dtype)
    test_triton_step.assert_right(meta_linear_attention, attention, "reference", tolerance)
    convolution = test_triton_step.make_convolution(2, 96, dtype=dtype)
    test_triton_step.assert_right(short_convolution, convolution, "torch", tolerance)


def test_both_gpus_in_turn():
    """A kernel is loaded on each GPU. The second round launches it directly."""
    tensors = test_triton_mixer.make(2, 200, 2, 64, 128, dtype=torch.bfloat16)
    results = {}
    for device in ("cuda:0", "cuda:1") * 2:
        own = {name: x.to(device) for name, x in tensors.items()}
        with torch.no_grad():
            out, state = meta_linear_attention(**own, output_final_state=True, backend="triton")
        assert str(out.device) == device
        results.setdefault(device, []).extend([out.cpu(), state.cpu()])
    assert all(map(torch.equal, results["cuda:0"], results["cuda:1"]))
