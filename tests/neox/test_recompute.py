"""What the backward pass computes again is not kept, and changes no gradient."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from megatron_patch.neox.recompute import ForTwo, Rerun, recomputed


class Weight(torch.autograd.Function):
    """An operation that saves its input by `save_for_backward`, as the kernels do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        return d_y * weight, (d_y * x).flatten(0, -2).sum(0)


def run(is_on):
    """Returns the loss, the gradients, and whether the norm's output was alive before backward."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, requires_grad=True)
    weights = [torch.randn(8, requires_grad=True), torch.randn(6, 8, requires_grad=True)]
    normed = F.rms_norm(x, (8,))
    storage = weakref.ref(normed.untyped_storage())
    compute = partial(F.rms_norm, x.detach(), (8,))
    with recomputed(normed, compute if is_on else None):
        y = Weight.apply(normed, weights[0]).sum() + F.linear(normed, weights[1]).square().sum()
    del normed
    gc.collect()
    is_kept = storage() is not None
    return [y.detach(), *torch.autograd.grad(y, [x, *weights])], is_kept


def test_gradients_are_the_same_and_the_value_is_gone():
    (kept, is_kept), (found, is_still_kept) = run(False), run(True)
    assert all(map(torch.equal, found, kept))
    assert is_kept and not is_still_kept


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_hooked_without_gradients(grad):
    value = torch.ones(2)
    with torch.set_grad_enabled(grad), recomputed(value, lambda: 1 / 0):
        y = value * torch.ones(2, requires_grad=True)
    if grad:
        y.sum().backward()


def test_a_parameter_may_lose_its_memory_before_the_backward_pass():
    """As with ZeRO 3, whose products save the parameter."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.nn.Parameter(torch.randn(8))
    value, memory = x.exp(), weight.data.clone()
    storage = weakref.ref(weight.untyped_storage())
    with recomputed(value, x.detach().exp, weight):
        y = Weight.apply(value, weight)
    weight.data = torch.empty(0)
    gc.collect()
    assert storage() is None
    weight.data = memory
    d_x, d_weight = torch.autograd.grad(y.sum(), [x, weight])
    assert torch.equal(d_x, memory * x.exp()) and torch.equal(d_weight, x.exp().sum(0))


def test_two_share_what_is_computed():
    made = []
    once = ForTwo(lambda: made.append(0) or torch.full((1,), len(made)))
    assert [once().item() for _ in range(4)] == [1, 1, 2, 2]


class TestRerun:
    """Of a function whose operations save inputs, results and others, its second argument absent,
    before an operation that would keep its result."""

    def setup_method(self):
        torch.manual_seed(0)
        self.x = torch.randn(3, 8, requires_grad=True)
        self.weight = torch.randn(8, requires_grad=True)
        self.out = torch.randn(8, 8, requires_grad=True)
        self.calls, self.storages = 0, []

    def function(self, x, absent, weight):
        self.calls += 1
        y = Weight.apply(x.exp().tanh() * x, weight).sigmoid()
        self.storages.append(weakref.ref(y.untyped_storage()))
        return y, None

    def loss(self, is_on):
        rerun = Rerun(self.function, (self.x, None, self.weight), is_on)
        y, _ = rerun.first()
        with recomputed(y, rerun.again if is_on else None):
            return F.linear(y, self.out).square().sum()

    def gradients(self, loss, **options):
        return torch.autograd.grad(loss, [self.x, self.weight, self.out], **options)

    def test_gradients_are_the_same_and_nothing_is_kept(self):
        wanted, loss = self.gradients(self.loss(False)), self.loss(True)
        gc.collect()
        assert self.calls == 2 and self.storages[1]() is None
        assert all(map(torch.equal, self.gradients(loss), wanted))
        assert self.calls == 3
        del loss
        gc.collect()
        assert self.storages[2]() is None

    def test_a_retained_graph_runs_it_again(self):
        wanted, loss = self.gradients(self.loss(False)), self.loss(True)
        for retain in (True, True, False):
            assert all(map(torch.equal, self.gradients(loss, retain_graph=retain), wanted))
        assert self.calls == 5

    def test_what_needs_no_gradient_gets_none(self):
        """The operation behind then asks first, or nobody does."""
        self.out.requires_grad_(False)
        wanted = torch.autograd.grad(self.loss(False), [self.x, self.weight])
        found = torch.autograd.grad(self.loss(True), [self.x, self.weight])
        assert all(map(torch.equal, found, wanted))
        with torch.no_grad():
            assert not self.loss(True).requires_grad
        self.x.requires_grad_(False)
        (found,) = torch.autograd.grad(self.loss(True), [self.weight])
        assert torch.equal(found, wanted[1])


# `make` builds a layer. `run` returns its output and gradients, and how many bytes of its forward
# pass are still there afterwards, without its output.
LAYERS = """
    import copy, gc
    from megatron.model.init_functions import get_init_methods
    from megatron_patch.neox.layer import ParallelMetaLALayer
    from torch.profiler import ProfilerActivity, profile

    def make(recompute, dtype, **changes):
        args = copy.copy(neox_args)
        args.metala = {**(args.metala or {}), **changes, "recompute": recompute}
        layer = ParallelMetaLALayer(args, *get_init_methods(args), layer_number=0).to(dtype)
        torch.manual_seed(0)
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=0.1)
            vars(p).pop("stride", None)  # GPT-NeoX's number; Triton's interpreter calls PyTorch's
        return layer

    def run(layer, x, d_y, cu_seqlens=None):
        torch.manual_seed(1)
        x = x.clone().requires_grad_()
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            y = layer.compute(x, cu_seqlens)
            gc.collect()
        events = profiler.profiler.kineto_results.events()
        kept = sum(event.nbytes() for event in events if event.name() == "[memory]") - y.nbytes
        return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], d_y)], kept
"""
LEVELS = ["nothing", "cheap", "most"]


def test_gradients_have_the_same_bits(in_neox, config):
    """Whatever the norm, with dropout and with documents."""
    code = """
    neox_args.hidden_dropout = 0.1
    found = {}
    for neox_args.norm in ("simplermsnorm", "rmsnorm", "layernorm"):
        for dtype in (torch.float64, torch.bfloat16):
            x, d_y = torch.randn(2, 70, 2, 64, dtype=dtype)
            for cu_seqlens in (None, torch.tensor([0, 3, 70, 140], dtype=torch.int32)):
                runs = [run(make(level, dtype), x, d_y, cu_seqlens) for level in %r]
                found[f"{neox_args.norm}, {dtype}, {cu_seqlens}"] = [
                    [all(map(torch.equal, result, runs[0][0])), kept] for result, kept in runs
                ]
    answer(found)
    """
    found = in_neox(config, LAYERS + code % (LEVELS,))
    assert len(found) == 12
    for case, runs in found.items():
        assert all(equal for equal, _ in runs), case
        assert runs[-1][1] < 0.5 * runs[0][1], case


def bytes_kept(d: int, heads: int, k: int, v: int, f: int) -> dict[str, float]:
    """Bytes that a layer's kernels keep for a token, by level, in bfloat16 and chunks of 64."""
    products_and_sums = 2 * (d + d + 2 * heads * (k + v) + 2 * f)
    norms = 2 * 4  # rstd
    operator = 2 * heads * (v + 2 * k) + heads * (2 * k * v + 4 * k + 4) / 64 + 2 * 4 * heads
    convolution, output = 2 * d, 2 * heads * v
    most = products_and_sums + norms
    cheap = most + operator + convolution + output
    return {"most": most, "cheap": cheap, "nothing": cheap + 2 * (d + d + f)}


def test_bytes_kept_by_the_kernels(in_neox, config):
    """In Triton's interpreter, whose gradients have the same bits as well."""
    code = """
    from megatron_patch.ops import backends
    backends._plain = lambda operator: next(iter(backends.REGISTRY[operator]))
    x, d_y = torch.randn(2, 64, 2, 64, dtype=torch.bfloat16)
    found = [run(make(level, torch.bfloat16, backend="triton"), x, d_y) for level in %r]
    equal = [all(map(torch.equal, result, found[0][0])) for result, _ in found]
    answer([equal, [kept / 128 for _, kept in found]])
    """
    config.update(hidden_size=64, num_attention_heads=2, intermediate_size=96)
    equal, kept = in_neox(config, LAYERS + code % (LEVELS,), interpret_triton=True)
    assert dict(zip(LEVELS, kept, strict=True)) == bytes_kept(64, 2, 16, 32, 96)
    assert all(equal)
    # What docs/training.md says of 0.38B.
    assert [round(bytes_kept(1024, 8, 64, 128, 2816)[level], -2) for level in LEVELS] == [
        41_600, 31_800, 21_500,
    ]  # fmt: skip
