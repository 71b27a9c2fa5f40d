"""Launches that call a compiled kernel directly call the one that Triton would have chosen. A fake
driver, which launches nothing, lets this run on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import triton
from triton.backends import backends

from megatron_patch.ops.triton.launch import launch_key

# Runs in a process of its own, without Triton's interpreter. Compiles for Hopper.
CODE = """
import itertools
import json
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from megatron_patch.ops.triton.launch import launch

launched, through_triton, numbers = [], [], itertools.count(1)
device, refuses_direct_launches = 0, False


def launcher(source, metadata):
    def run(*arguments):
        if refuses_direct_launches and arguments[7] is None:  # Triton gives its chain of hooks
            raise TypeError
        launched.append((arguments[:3], arguments[4], arguments[9:]))

    return run


utils = SimpleNamespace(
    get_device_properties=lambda device: {"max_shared_mem": 232448},
    load_binary=lambda *arguments: ("module", next(numbers), 0, 0, 1024),
    unload_module=lambda module: None,
)
driver = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: device,
    get_current_stream=lambda device: 0,
    launcher_cls=launcher,
    utils=utils,
)
triton.runtime.driver.set_active(driver)


@triton.jit(do_not_specialize=["count"])
def kernel(x, pair, count, scale, strides, SIZE: tl.constexpr, FLAG: tl.constexpr):
    y, z = pair
    at = tl.arange(0, SIZE)
    value = tl.load(x + at * strides[0], mask=at < count, other=0.0).to(tl.float32) * scale
    if z is not None:
        value += tl.load(z + at * strides[1], mask=at < count, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < count)


run = type(kernel).run
type(kernel).run = lambda *a, **options: (through_triton.append(1), run(*a, **options))[1]


def flat(arguments):
    for x in arguments:
        if isinstance(x, tuple):
            yield from flat(x)
        else:
            yield x.data_ptr() if isinstance(x, torch.Tensor) else x


def tensor(dtype=torch.float32, offset=0):
    return torch.zeros(64, dtype=dtype)[offset:]


# One change each. Those of the second half need no other kernel.
base = dict(x=tensor(), y=tensor(), z=tensor(), count=32, scale=0.5, strides=(3, 5), SIZE=16)
changes = [
    {}, dict(x=tensor(torch.bfloat16)), dict(x=tensor(offset=1)), dict(y=tensor(offset=2)),
    dict(z=None), dict(z=tensor(torch.float16)), dict(z=tensor(offset=3)), dict(scale=1),
    dict(scale=2), dict(strides=(1, 5)), dict(strides=(3, 1)), dict(strides=(16, 5)),
    dict(strides=(3, 32)), dict(strides=(2**31, 5)), dict(SIZE=32), dict(num_warps=1),
    dict(count=2**31), dict(device=1),
    dict(count=1), dict(count=33), dict(scale=1.0), dict(strides=(7, 9)), dict(x=tensor(offset=4)),
]  # fmt: skip


def call(how, grid=(7,), **change):
    global device
    device = change.pop("device", 0)
    a = {**base, **change}
    tensors = a.pop("x"), (a.pop("y"), a.pop("z"))
    rest = a.pop("count"), a.pop("scale"), a.pop("strides")
    if how == "triton":
        return kernel[grid](*tensors, *rest, FLAG=True, **a)
    launch(kernel, grid, tensors, rest, FLAG=True, **a)


def launched_by(how, change, **more):
    launched.clear()
    call(how, **change, **more)
    ((grid, function, arguments),) = launched
    # Triton gives constexpr parameters too, which the compiled kernel ignores.
    return grid, function, list(flat(arguments))[:7], len(arguments)
"""

needs_compiler = pytest.mark.skipif(
    "nvidia" not in backends or not hasattr(triton, "AsyncCompileMode"),
    reason="this Triton compiles for no NVIDIA GPU, or is older than 3.5",
)


def in_new_process(code: str, folder) -> list:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    file = folder / "code.py"  # where Triton finds a kernel's source
    file.write_text(CODE + code)
    result = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@needs_compiler
def test_direct_launches_call_the_kernel_that_triton_chooses(tmp_path):
    code = """
answers = []
for change in changes:
    call("launch", **change)
for change in reversed(changes):
    before = len(through_triton)
    found = launched_by("launch", change)
    was_direct = len(through_triton) == before
    answers.append([str(change), was_direct, found, launched_by("triton", change)])
grids = [launched_by("launch", {}, grid=grid)[0] for grid in [(2,), (3, 4), (5, 6, 7)]]
print(json.dumps([answers, grids]))
"""
    answers, grids = in_new_process(code, tmp_path)
    for change, was_direct, found, wanted in answers:
        assert was_direct, change
        assert found == wanted, change
    functions = [found[1] for *_, found, _ in reversed(answers)]
    assert len(set(functions[:-5])) == len(functions) - 5  # the fake driver tells kernels apart
    assert set(functions[-5:]) == {functions[0]}
    assert grids == [[2, 1, 1], [3, 4, 1], [5, 6, 7]]


@needs_compiler
def test_who_gets_tritons_own_launch(tmp_path):
    """The first launch, those that a profiler watches, and all once Triton's launcher has refused a
    direct one."""
    code = """
def is_direct():
    before = len(through_triton)
    call("launch")
    return len(through_triton) == before


answers = [is_direct(), is_direct()]
for chain in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
    hook = lambda metadata: None
    chain.add(hook)
    answers.append(is_direct())
    chain.remove(hook)
    answers.append(is_direct())
refuses_direct_launches = True
launched.clear()
answers += [is_direct(), is_direct()]
print(json.dumps([answers, len(launched)]))
"""
    answers, count = in_new_process(code, tmp_path)
    assert answers == [False, True, False, True, False, True, False, False]
    assert count == 2


def key_of(*tensors, numbers=(), kernel="kernel", device=0, **options):
    return launch_key(kernel, device, tensors, numbers, options)[0]


def test_what_the_key_tells_apart():
    x = torch.zeros(64, dtype=torch.bfloat16)
    y = torch.zeros(64, dtype=torch.bfloat16)
    assert x.data_ptr() % 16 == y.data_ptr() % 16 == 0
    assert key_of(x) == key_of(y) == key_of(x[8:])
    others = [
        key_of(x), key_of(x[1:]), key_of(x.float()), key_of(None), key_of((x,)), key_of(x, y),
        key_of((x, y)), key_of((x, None)), key_of(x, device=1), key_of(x, kernel="other"),
        key_of(x, numbers=(1,)), key_of(x, numbers=(1.0,)), key_of(x, numbers=(True,)),
        key_of(x, numbers=(2,)), key_of(x, numbers=(16,)), key_of(x, numbers=((1, 2),)),
        key_of(x, numbers=((2, 1),)), key_of(x, SIZE=16), key_of(x, SIZE=32),
        key_of(x, num_warps=16), key_of(x, maxnreg=None),
    ]  # fmt: skip
    assert len(set(others)) == len(others)
    addresses = launch_key("kernel", 0, (x, None, (x[1:], y)), (), {})[1]
    assert addresses == [x.data_ptr(), None, (x.data_ptr() + 2, y.data_ptr())]
