"""The kernels that the first call compiles together. A fake driver, which launches nothing, lets
this run on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
from triton.backends import backends

from megatron_patch.ops.triton import launch

# Runs in a process of its own, without Triton's interpreter. Compiles for Hopper.
DRIVER = """
import json
import threading
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from megatron_patch.ops.triton import chunk, launch

launched, compiled, rounds, lock = [], [], [], threading.Lock()


def launcher(source, metadata):  # replaces the one that Triton generates for a signature
    return lambda *arguments: launched.append(source.name)


utils = SimpleNamespace(
    get_device_properties=lambda device: {"max_shared_mem": 232448},
    load_binary=lambda *arguments: (None, None, 0, 0, 1024),
)
driver = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    launcher_cls=launcher,
    utils=utils,
)
triton.runtime.driver.set_active(driver)
# `is_manual_warmup` is true for kernels compiled ahead of their launch.
triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, is_manual_warmup, **_: compiled.append(
    [fn.name, is_manual_warmup]
)
one_round = launch._compile


def counted(run, arguments):
    rounds.append(run.__name__)
    one_round(run, arguments)


launch._compile = counted


def call(T, **arguments):
    widths = (16, 16, 32, 32)
    inputs = [torch.ones(1, T, 1, w, dtype=torch.bfloat16, requires_grad=True) for w in widths]
    q, gate_logits, v, out_gate = inputs
    parameters = [torch.ones(1, w, requires_grad=True) for w in (16, 32)]
    aug, bias = parameters
    out, _ = chunk.meta_linear_attention(
        q, gate_logits, v, aug, out_gate, out_gate_bias=bias, tau=16.0, scale=0.25, norm_eps=1e-5,
        **arguments,
    )
    if torch.is_grad_enabled():
        torch.autograd.grad(out, inputs + parameters, torch.ones_like(out))


def answer():
    print(json.dumps([compiled, launched, rounds]))
"""
FORWARD = ["chunk_prepare_kernel", "chunk_h_kernel", "chunk_fwd_o_kernel"]
BACKWARD = [
    "chunk_bwd_o_kernel",
    "chunk_h_kernel",
    "chunk_bwd_kernel",
    "chunk_bwd_fallback_kernel",
    "sum_partials_kernel",
    "sum_partials_kernel",
]

needs_asynchronous_compilation = pytest.mark.skipif(
    not hasattr(triton, "AsyncCompileMode"), reason="Triton before 3.5"
)


def in_new_process(code: str, folder) -> list:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-c", DRIVER + textwrap.dedent(code) + "\nanswer()"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif("nvidia" not in backends, reason="this Triton compiles for no NVIDIA GPU")
@needs_asynchronous_compilation
def test_both_passes_compile_their_kernels_together_and_once(tmp_path):
    """Two threads call at once, and the launches themselves compile nothing. A later call of
    another length neither compiles nor starts a compile pass."""
    code = """
    threads = [threading.Thread(target=call, args=[length]) for length in (40, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    call(73)
    """
    compiled, launched, rounds = in_new_process(code, tmp_path)
    assert sorted(launched) == sorted(3 * (FORWARD + BACKWARD))
    # The second `sum_partials` is already compiled; the inter-chunk scan runs in two directions.
    kernels = {*FORWARD, *BACKWARD}
    assert sorted(compiled) == sorted([[kernel, True] for kernel in [*kernels, "chunk_h_kernel"]])
    assert rounds == ["forward"]


@pytest.mark.skipif("nvidia" not in backends, reason="this Triton compiles for no NVIDIA GPU")
@needs_asynchronous_compilation
def test_a_compile_pass_exchanges_nothing(tmp_path):
    """With ranks that split the tokens: they exchange states once in each pass, and the launches
    themselves compile nothing."""
    code = """
    asked = []

    def exchange(own, log_decay, reverse):
        asked.append(reverse)
        return torch.zeros_like(own)

    context = SimpleNamespace(exchange=lambda q, cu_seqlens: exchange)
    call(40, context=context)
    call(73, context=context)
    assert asked == [False, True] * 2, asked
    """
    compiled, launched, rounds = in_new_process(code, tmp_path)
    assert launched.count("chunk_h_kernel") == 2 * 4  # two walks in each pass
    assert all(ahead for _, ahead in compiled) and rounds == ["forward"]


@pytest.mark.skipif("nvidia" not in backends, reason="this Triton compiles for no NVIDIA GPU")
@needs_asynchronous_compilation
def test_without_gradients_only_the_forward_pass_is_compiled(tmp_path):
    code = """
    with torch.no_grad():
        call(40)
    """
    compiled, launched, rounds = in_new_process(code, tmp_path)
    assert launched == FORWARD
    assert sorted(compiled) == sorted([[kernel, True] for kernel in FORWARD])
    assert rounds == ["forward"]


@needs_asynchronous_compilation
def test_a_compilation_that_failed_is_tried_again(monkeypatch):
    """Even where the caller uses AsyncCompileMode as well."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rounds = []  # per run, whether it was a compile pass

    @launch.compiled_together(lambda x: x.shape)
    def run(x):
        rounds.append(launch._compiling.get())
        if len(rounds) == 1:
            raise RuntimeError("no memory")
        return x + 1

    x = torch.zeros(2)
    with ThreadPoolExecutor() as executor, triton.AsyncCompileMode(executor):
        with pytest.raises(RuntimeError, match="no memory"):
            run(x)
        assert torch.equal(run(x), x + 1)
        assert rounds == [True, True, False]
        run(x)
        run(torch.zeros(3))
    assert rounds[3:] == [False, True, False]


@pytest.mark.parametrize("reason", ["interpreter", "old Triton"])
def test_nothing_changes_where_nothing_can_be_compiled_together(monkeypatch, reason):
    if reason == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.delattr(triton, "AsyncCompileMode", raising=False)
    assert launch.compiled_together(len)(print) is print
