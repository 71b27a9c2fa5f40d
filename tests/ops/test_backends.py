"""The choice of a backend, on machines and GPUs that these tests pretend."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import megatron_patch.ops as ops
from megatron_patch.ops import backends
from megatron_patch.ops.backends import (
    CHECKED_WIDTHS,
    REGISTRY,
    choose,
    names_of,
    unsupported_reason,
)
from tests.gpu.operator_sweep import IN_ALL_DTYPES, WIDTHS

CUDA, OTHER_CUDA, CPU = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
HOPPER = (9, 0)
SIZES = {
    "accumulate": {},
    "adam_step": {},
    "add_rms_norm": {},
    "cross_entropy": {},
    "meta_linear_attention": dict(K=64, V=128),
    "short_convolution": dict(D=64, W=4, packed_state=False),
    "swiglu": {},
    "swiglu_backward": {},
    "token_decoder": dict(D=1024, H=8, K=64, V=128, F=2816),
}
OURS = [
    (operator, backend)
    for operator, kinds in REGISTRY.items()
    for backend, kind in kinds.items()
    if kind.package is not None and kind.checked is not None
]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Function: pretends installed packages, the GPUs' compute capabilities, and their vendor.

    By default all packages are there, with no limits of their own, and the GPUs are H200s.
    """

    def pretend(
        packages=("triton", "flash-linear-attention", "causal-conv1d", "cuda-bindings"),
        capabilities=HOPPER,
        hip=None,
    ):
        monkeypatch.setattr(backends, "_decided", {})
        for kinds in REGISTRY.values():
            for kind in kinds.values():
                if kind.package is None:
                    continue
                failure = None if kind.package in packages else "is not installed (pretended)"
                monkeypatch.setitem(backends._failures, kind.module, failure)
                monkeypatch.setitem(sys.modules, kind.module, SimpleNamespace())
        if isinstance(capabilities, tuple):
            capabilities = {CUDA: capabilities, OTHER_CUDA: capabilities}
        # PyTorch's compiler asks too, by index and for the GPU in use.
        monkeypatch.setattr(
            torch.cuda,
            "get_device_capability",
            lambda device=None: capabilities[torch.device("cuda", torch.device(device or 0).index)],
        )
        monkeypatch.setattr(torch.version, "hip", hip)

    backends.say.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pretend()
    return pretend


def auto(operator, dtype=torch.bfloat16, device=CUDA, **changes):
    return choose(operator, "auto", dtype, device, **{**SIZES[operator], **changes})


@pytest.mark.parametrize("operator", REGISTRY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_fastest_is_taken_where_it_was_checked(operator, dtype, caplog):
    assert auto(operator, dtype) == next(iter(REGISTRY[operator]))
    assert not caplog.records


@pytest.mark.parametrize(
    ("capability", "hip"),
    [
        (HOPPER, "6.2"),  # an MI250 reads as a H100
        ((9, 4), "6.2"),
        ((7, 0), None),
        ((7, 5), None),
        ((8, 0), None),
        ((8, 9), None),
        ((10, 0), None),
        ((12, 0), None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("operator", REGISTRY)
def test_auto_takes_our_kernels_nowhere_else(machine, caplog, operator, capability, hip, dtype):
    machine(capabilities=capability, hip=hip)
    taken = auto(operator, dtype)
    assert (operator, taken) not in OURS
    for _ in range(3):
        assert auto(operator, dtype) == taken
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    line = record.getMessage()
    assert "\n" not in line and f"{operator} on cuda:0 by {taken!r}" in line
    found = "an AMD GPU" if hip else "compute capability {}.{}".format(*capability)
    assert f"found {found}" in line


@pytest.mark.parametrize(("operator", "backend"), OURS)
@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        (HOPPER, "6.2", "found an AMD GPU, wanted one of NVIDIA"),
        ((7, 5), None, r"found compute capability 7\.5, wanted 8\.0 or more"),
        ((6, 1), None, r"found compute capability 6\.1, wanted 8\.0 or more"),
    ],
)
def test_what_cannot_run_says_why(machine, operator, backend, capability, hip, reason):
    machine(capabilities=capability, hip=hip)
    with pytest.raises(ValueError, match=f"^backend '{backend}': {reason}; use backend 'auto' or"):
        choose(operator, backend, torch.float16, CUDA, **SIZES[operator])


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (10, 0), (12, 1)])
def test_by_name_kernels_run_where_nobody_has_checked_them(machine, capability):
    machine(capabilities=capability)
    for operator in ("meta_linear_attention", "short_convolution", "swiglu"):
        how = (operator, "triton", torch.bfloat16, CUDA)
        assert choose(*how, **{**SIZES[operator]}) == "triton"


def test_each_gpu_is_asked_for_itself(machine, caplog):
    machine(capabilities={CUDA: (7, 5), OTHER_CUDA: HOPPER})
    assert auto("swiglu", device=CUDA) == "torch"
    assert auto("swiglu", device=OTHER_CUDA) == "triton"
    assert len(caplog.records) == 1 and "on cuda:0" in caplog.text


@pytest.mark.parametrize("kind", ["xpu", "mps", "hpu"])
def test_other_accelerators(caplog, kind):
    device = torch.device(kind, 0)
    assert auto("meta_linear_attention", device=device) == "chunked"
    assert auto("token_decoder", device=device) == "layers"
    assert len(caplog.records) == 2 and f"found tensors on {kind}:0, wanted cuda" in caplog.text
    with pytest.raises(ValueError, match=f"backend 'triton': found tensors on {kind}:0"):
        choose("swiglu", "triton", torch.float32, device)


@pytest.mark.parametrize("operator", REGISTRY)
def test_nothing_is_said_where_no_kernel_is_expected(machine, operator, caplog):
    machine(packages=())
    plain = next(name for name, kind in REGISTRY[operator].items() if kind.package is None)
    for dtype, device in (
        (torch.float32, CPU),
        (torch.bfloat16, torch.device("meta")),
        (torch.float64, CUDA),
    ):
        assert auto(operator, dtype, device) == plain
    assert not caplog.records


def test_a_gpu_that_is_not_there(monkeypatch, caplog):
    """Fake tensors trace a model for another machine."""

    def no_driver(device):
        raise RuntimeError("Found no NVIDIA driver.\nPlease install one.")

    monkeypatch.setattr(torch.cuda, "get_device_capability", no_driver)
    assert auto("swiglu") == "torch"
    assert "cannot ask cuda:0 for its compute capability (Found no NVIDIA driver.)" in caplog.text


@pytest.mark.parametrize(
    ("packages", "K", "V", "dtype", "taken"),
    [
        (("triton", "flash-linear-attention"), 64, 128, torch.bfloat16, "triton"),
        (("triton",), 64, 128, torch.float32, "triton"),
        (("triton", "flash-linear-attention"), 2, 4, torch.bfloat16, "fla"),
        (("triton",), 16, 32, torch.bfloat16, "triton"),
        (("triton",), 2, 4, torch.bfloat16, "chunked"),
        (("triton",), 512, 1024, torch.bfloat16, "chunked"),
        (("triton",), 256, 512, torch.float32, "chunked"),
        (("triton",), 128, 64, torch.bfloat16, "chunked"),
        (("flash-linear-attention",), 64, 128, torch.float16, "fla"),
        ((), 64, 128, torch.bfloat16, "chunked"),
    ],
)
def test_widths_and_packages(machine, caplog, packages, K, V, dtype, taken):
    machine(packages)
    assert auto("meta_linear_attention", dtype, K=K, V=V) == taken
    assert len(caplog.records) == (taken != "triton")
    if taken != "triton" and "triton" in packages:
        assert f"found K = {K}, V = {V}" in caplog.text


def test_the_convolution_goes_on_to_the_next(machine, caplog):
    machine(packages=("causal-conv1d",))
    assert auto("short_convolution") == "causal_conv1d"
    machine(packages=())
    assert auto("short_convolution") == "torch"
    assert len(caplog.records) == 2 and "triton is not installed" in caplog.text


def test_what_a_backend_says_itself(monkeypatch, caplog):
    """Its module holds a function `unsupported_reason`."""
    kind = REGISTRY["token_decoder"]["cuda"]
    limits = SimpleNamespace(
        unsupported_reason=lambda dtype, device, **sizes: f"found {sizes['H']} heads"
    )
    monkeypatch.setitem(sys.modules, kind.module, limits)
    assert auto("token_decoder") == "layers"
    assert "'cuda' found 8 heads" in caplog.text


def test_a_backend_for_another_vendor(machine, monkeypatch):
    entry = backends.Backend("megatron_patch.ops.fla", "flash-linear-attention", vendors=("AMD",))
    monkeypatch.setitem(REGISTRY["swiglu"], "rocm", entry)
    reason = unsupported_reason("swiglu", "rocm", torch.bfloat16, CUDA)
    assert reason == "found an NVIDIA GPU, wanted one of AMD"
    machine(capabilities=(9, 4), hip="6.2")
    assert unsupported_reason("swiglu", "rocm", torch.bfloat16, CUDA) is None


def hopper_chunks(dtype=torch.bfloat16, device=CUDA):
    return backends.hopper_chunks(dtype, device, 64, 128)


def test_where_cuda_kernels_serve_chunks(machine, monkeypatch, caplog):
    kind = backends.HOPPER_CHUNKS
    monkeypatch.setitem(sys.modules, kind.module, SimpleNamespace())
    monkeypatch.setitem(backends._failures, kind.module, None)
    assert hopper_chunks()
    assert not hopper_chunks(torch.float16) and not hopper_chunks(device=CPU)
    limits = SimpleNamespace(unsupported_reason=lambda dtype, device, **sizes: f"found {sizes}")
    monkeypatch.setattr(backends, "_decided", {})
    monkeypatch.setitem(sys.modules, kind.module, limits)
    assert not hopper_chunks()
    for capability, hip in (((8, 0), None), ((10, 0), None), (HOPPER, "6.2")):
        machine(capabilities=capability, hip=hip)
        assert not hopper_chunks()
    assert not caplog.records
    machine()
    monkeypatch.setitem(backends._failures, kind.module, "is not installed (pretended)")
    assert not hopper_chunks() and not hopper_chunks()
    (record,) = caplog.records
    assert "cuda-bindings is not installed (pretended): on Hopper" in record.getMessage()


def test_the_interpreter_runs_on_request_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert auto("swiglu", torch.float32, CPU) == "torch"
    assert choose("swiglu", "triton", torch.float32, CPU) == "triton"
    assert unsupported_reason("swiglu", "triton", torch.float64, CPU).startswith("found float64")


def test_every_operator_asks(machine, monkeypatch):
    """Asks for a kernel that cannot run, on fake tensors, which need no GPU."""
    machine(capabilities=(7, 5))
    with FakeTensorMode():
        q, v, x = (torch.empty(1, 3, *s, device="cuda") for s in ((2, 8), (2, 16), (8,)))
        weight = torch.empty(8, 1, 4, device="cuda")
        for call in (
            lambda backend: ops.meta_linear_attention(q, q, v, backend=backend),
            lambda backend: ops.short_convolution(x, weight, backend=backend),
            lambda backend: ops.swiglu(x, backend=backend),
        ):
            with pytest.raises(ValueError, match=r"backend 'triton': .* capability 7\.5"):
                call("triton")
        taken = []
        name = "meta_linear_attention.chunked"
        monkeypatch.setitem(backends._functions, name, lambda *a, **k: taken.append("chunked"))
        ops.meta_linear_attention(q, q, v)
    assert taken == ["chunked"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_is_told_too(machine, caplog, dynamic):
    machine(capabilities=(7, 5))

    def f(x):
        return choose("meta_linear_attention", "auto", x.dtype, CUDA, K=x.shape[-1], V=4), x + 1

    compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=dynamic)
    for width in (3, 4, 5):
        assert compiled(torch.ones(2, width))[0] == "chunked"
    assert sum(record.name == backends.__name__ for record in caplog.records) == 1


def test_widths_that_auto_takes_are_those_that_the_sweep_checks():
    for dtype, (smallest, largest, ratios) in CHECKED_WIDTHS.items():
        checked = WIDTHS if dtype == torch.bfloat16 else IN_ALL_DTYPES
        for ratio in ratios:
            assert {(k, ratio * k) for k in (smallest, largest)} <= set(checked)


def test_names():
    assert names_of("meta_linear_attention") == ("auto", "triton", "fla", "chunked", "reference")
    assert names_of("short_convolution") == ("auto", "triton", "causal_conv1d", "torch")
    assert names_of("swiglu") == ("auto", "triton", "torch")


USE_OPERATORS = """
import torch
from megatron_patch.ops import backends, meta_linear_attention, short_convolution, swiglu
import megatron_patch.neox
q, v = torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 16)
meta_linear_attention(q, q, v), short_convolution(torch.ones(1, 3, 8), torch.ones(8, 1, 4))
swiglu(torch.ones(3, 8))
for kinds in backends.REGISTRY.values():
    for name, kind in kinds.items():
        if kind.package is not None:
            print(kind.package, backends.import_failure(kind.module))
"""


@pytest.mark.parametrize(
    ("modules", "reasons"),
    [
        (
            dict.fromkeys(("cuda", "triton", "fla", "causal_conv1d", "wandb", "deepspeed"), ""),
            [
                "cuda-bindings is not installed (No module named 'cuda.bindings'",
                "triton is not installed (No module named 'triton.language'",
                "flash-linear-attention is not installed (No module named 'fla.ops'",
                "causal-conv1d cannot be imported (ImportError: cannot import name",
            ],
        ),
        (
            {
                "triton": "raise OSError('first\\nsecond')",
                "fla": "import no_such",
                "causal_conv1d": "x = ",
                "wandb": "1 / 0",
                "deepspeed": "1 / 0",
            },
            [
                "triton cannot be imported (OSError: first)",
                "flash-linear-attention is not installed (No module named 'no_such')",
                "causal-conv1d cannot be imported (SyntaxError",
            ],
        ),
    ],
    ids=["another", "broken"],
)
def test_another_or_a_broken_module_of_a_packages_name(tmp_path, modules, reasons):
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", USE_OPERATORS],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for reason in reasons:
        assert f"\n{reason}" in f"\n{result.stdout}"
