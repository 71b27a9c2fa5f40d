"""CUDA graphs of layers give the bits of the layers without them, whatever happens between."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron_patch.neox.cuda_graphs import WARM_UP, LayerGraphs
from megatron_patch.neox.gradient_sums import GradientSums
from megatron_patch.neox.recompute import Rerun, recomputed
from megatron_patch.ops import meta_linear_attention, short_convolution

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE, LAYERS = (64, 4, 128), 3


class Layer(nn.Module):
    """What LayerGraphs asks of a layer: `compute` and its place."""

    def __init__(self, number: int):
        super().__init__()
        self.layer_number = number
        self.up = nn.Linear(SHAPE[-1], 256, bias=False)
        self.down = nn.Linear(256, SHAPE[-1])
        self.graphs: LayerGraphs | None = None

    def compute(self, x, cu_seqlens=None):
        return x + self.down(F.silu(self.up(F.rms_norm(x, SHAPE[-1:]))))


class MixingLayer(Layer):
    """A layer of two heads whose convolution and state begin anew in each document."""

    recomputes = False

    def __init__(self, number: int):
        super().__init__(number)
        self.convolution = nn.Parameter(torch.randn(SHAPE[-1], 1, 4))
        self.aug = nn.Parameter(torch.randn(2, 32))
        self.bias = nn.Parameter(torch.randn(2, 64))
        self.projection = nn.Linear(SHAPE[-1], 2 * (32 + 32 + 64 + 64), bias=False)
        self.output = nn.Linear(SHAPE[-1], SHAPE[-1], bias=False)

    def compute(self, x, cu_seqlens=None):
        rows = x.transpose(0, 1).reshape(1, -1, SHAPE[-1])

        def convolve(rows):
            return short_convolution(rows, self.convolution, cu_seqlens=cu_seqlens)[0]

        def operate(q, gate_logits, v, aug, out_gate, bias):
            out, _ = meta_linear_attention(
                q,
                gate_logits,
                v,
                aug,
                out_gate,
                out_gate_bias=bias,
                cu_seqlens=cu_seqlens,
                backend="triton",
            )
            return (out.flatten(-2),)

        convolved = convolve(rows)
        with recomputed(convolved, partial(convolve, rows.detach()) if self.recomputes else None):
            heads = self.projection(convolved).unflatten(-1, (2, -1)).split([32, 32, 64, 64], -1)
        operate = Rerun(operate, (*heads[:3], self.aug, heads[3], self.bias), self.recomputes)
        (out,) = operate.first()
        with recomputed(out, operate.again if self.recomputes else None):
            mixed = self.output(out).view(x.shape[1], x.shape[0], SHAPE[-1]).transpose(0, 1)
        return super().compute(x + mixed)


class RecomputingLayer(MixingLayer):
    """Computes convolution and operator again in the backward pass, as `recompute: most` does."""

    recomputes = True


class Model:
    """Three layers, the last two numbers apart, as where an attention layer lies between."""

    def __init__(self, with_graphs: bool, with_sums: bool = False, kind: type = Layer):
        torch.manual_seed(0)
        self.layers = [kind(number).cuda().bfloat16() for number in (0, 1, 3)]
        self.parameters = [p for layer in self.layers for p in layer.parameters()]
        self.sums, self.told, self.lines = None, [], []
        if with_sums:
            # What DeepSpeed's optimizer holds. Nothing has filled the sums with zeros.
            optimizer = SimpleNamespace(
                bf16_groups=[self.parameters],
                fp32_groups_gradients=[
                    [torch.full((p.numel(),), torch.nan, device="cuda") for p in self.parameters]
                ],
                fp32_groups_has_gradients=[[False] * len(self.parameters)],
            )
            self.sums = GradientSums(optimizer, self.told.append)
        self.graphs = LayerGraphs(self.layers, self.sums, self.lines.append)
        self.graphs.is_on = with_graphs
        self.by_graph = 0

    def __call__(self, x, cu_seqlens=None):
        for index, layer in enumerate(self.layers):
            y = self.graphs.run(index, x, cu_seqlens)
            self.by_graph += y is not None
            x = layer.compute(x, cu_seqlens) if y is None else y
        return x

    def gradients(self):
        return [p.grad.clone() for p in self.parameters]


def batch(seed: int, shape=SHAPE):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_()
    return x, torch.randn(shape, generator=generator, device="cuda").bfloat16()


def step(model, seed, shape=SHAPE, cu_seqlens=None):
    x, d_y = batch(seed, shape)
    y = model(x, cu_seqlens)
    y.backward(d_y)
    return [y.detach().clone(), x.grad.clone()]


def both(**options):
    return Model(True, **options), Model(False)


def assert_equal(found, wanted):
    assert all(map(torch.equal, found, wanted))


def test_bits_over_accumulation_and_updates():
    graphs, plain = both()
    for seed in range(WARM_UP + 6):
        assert_equal(step(graphs, seed), step(plain, seed))
        assert_equal(graphs.gradients(), plain.gradients())  # sums over micro-batches
        if seed % 2:
            with torch.no_grad():
                for model in (graphs, plain):
                    for p in model.parameters:
                        p -= 0.01 * p.grad
                        p.grad = None
    assert graphs.by_graph == 6 * LAYERS
    assert len(graphs.lines) == 1 and "CUDA graphs of 3 layers" in graphs.lines[0]


def test_gradients_are_added_where_the_optimizer_keeps_them():
    """The first of a step takes the place of what the step before left, by replays and where a
    micro-batch of another shape runs without graphs."""
    graphs, plain = both(with_sums=True)
    for p in graphs.parameters:
        p.register_post_accumulate_grad_hook(add_to_sum_of(graphs))
    for seed in range(WARM_UP + 1):
        step(graphs, seed), step(plain, seed)
    graphs.sums.forget(), graphs.told.clear()
    for p in plain.parameters:
        p.grad = None
    other = (32, 2, SHAPE[-1])
    seed, by_graph = 20, graphs.by_graph
    for shapes in [[SHAPE], [SHAPE] * 3, [SHAPE, other], [other, SHAPE, SHAPE], [other], [SHAPE]]:
        wanted = [torch.zeros(p.numel(), device="cuda") for p in plain.parameters]
        for shape in shapes:
            seed += 1
            assert_equal(step(graphs, seed, shape), step(plain, seed, shape))
            for total, p in zip(wanted, plain.parameters, strict=True):
                total += p.grad.flatten()
                p.grad = None
        assert_equal([graphs.sums.of(p) for p in graphs.parameters], wanted)
        assert len(graphs.told) == len(shapes) * len(graphs.parameters)
        graphs.sums.forget(), graphs.told.clear()
    assert all(p.grad is None for p in graphs.parameters)
    assert graphs.by_graph == by_graph + 8 * LAYERS


def add_to_sum_of(model):
    """Returns what DeepSpeed does with a gradient of a layer that runs without its graph."""

    def add(p):
        model.sums.add(p, p.grad)
        p.grad = None

    return add


def test_two_forward_passes_before_a_backward_pass():
    """As in a pipeline: the second runs without graphs, and both gradients are right."""
    graphs, plain = both()
    for seed in range(WARM_UP + 1):
        step(graphs, seed), step(plain, seed)
    found = []
    for model in (graphs, plain):
        before = model.by_graph
        (x1, d1), (x2, d2) = batch(8), batch(9)
        y1, y2 = model(x1), model(x2)
        kept = [y1.detach().clone(), y2.detach().clone()]
        y1.backward(d1)
        y2.backward(d2)
        found.append([*kept, x1.grad, x2.grad, *model.gradients()])
        assert model.by_graph - before == (LAYERS if model is graphs else 0)
    assert_equal(*found)


def test_what_does_not_fit_runs_without():
    graphs, plain = both()
    for seed in range(WARM_UP + 1):
        step(graphs, seed), step(plain, seed)
    before = graphs.by_graph
    shape = (32, 2, SHAPE[-1])
    assert_equal(step(graphs, 5, shape), step(plain, 5, shape))
    with torch.no_grad():  # validation
        assert_equal([graphs(batch(6)[0])], [plain(batch(6)[0])])
    assert graphs.by_graph == before
    graphs(batch(7)[0])  # whose backward pass never comes
    assert_equal(step(graphs, 8), step(plain, 8))
    assert graphs.by_graph == before + 2 * LAYERS


def test_parameters_that_move_are_captured_again():
    graphs, plain = both()
    for seed in range(WARM_UP + 1):
        step(graphs, seed), step(plain, seed)
    for p in graphs.parameters:
        p.data = p.data.clone()
    before = graphs.by_graph
    for seed in (5, 6):
        assert_equal(step(graphs, seed), step(plain, seed))
    assert graphs.by_graph == before + 2 * LAYERS and len(graphs.lines) == 2


def test_a_capture_that_fails_is_told_and_trains_on():
    graphs, plain = both()
    compute = graphs.layers[1].compute

    def waits_for_the_gpu(x, cu_seqlens):
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return compute(x, cu_seqlens)

    graphs.layers[1].compute = waits_for_the_gpu
    for seed in range(WARM_UP + 2):
        assert_equal(step(graphs, seed), step(plain, seed))
    assert graphs.by_graph == 0
    assert len(graphs.lines) == 1 and graphs.lines[0].startswith("CUDA graphs off: the capture")


def boundaries(seed: int, count: int) -> torch.Tensor:
    """Those of `count` documents, of which some may be empty."""
    tokens = SHAPE[0] * SHAPE[1]
    cuts = torch.randint(tokens + 1, (count - 1,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([0, *sorted(cuts.tolist()), tokens], dtype=torch.int32, device="cuda")


def padded(cu_seqlens: torch.Tensor, room: int) -> torch.Tensor:
    """Adds empty documents, up to `room`, as the graphs do. Gradients of `aug`, the gate's bias and
    the convolution are sums over chunks, and empty documents have chunks too: the sums may be
    taken in another order, which changes their last bits."""
    return torch.cat([cu_seqlens, cu_seqlens[-1:].expand(room + 1 - len(cu_seqlens))])


def test_bits_with_documents_of_every_number():
    """The graphs have room for twice the warm-up's ten; a micro-batch with more runs without."""
    graphs, plain, unpadded = (Model(first, kind=MixingLayer) for first in (True, False, False))
    counts = [10, 4, 7, 5, 20, 1, 21, 20, 9, 30, 2]
    for seed, count in enumerate(counts):
        cu_seqlens = boundaries(seed, count)
        by_graph = seed >= WARM_UP and count <= 20
        found = step(graphs, seed, cu_seqlens=cu_seqlens)
        assert_equal(found, step(unpadded, seed, cu_seqlens=cu_seqlens))
        given = padded(cu_seqlens, 20) if by_graph else cu_seqlens
        assert_equal(found, step(plain, seed, cu_seqlens=given))
        assert_equal(graphs.gradients(), plain.gradients())
        for x, y in zip(graphs.gradients(), unpadded.gradients(), strict=True):
            torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-6 * y.abs().max().item())
        if seed == WARM_UP + 1:  # the boundaries change the numbers
            other = step(Model(False, kind=MixingLayer), seed, cu_seqlens=boundaries(seed, 2))
            assert not torch.equal(found[0], other[0])
    assert graphs.by_graph == LAYERS * sum(count <= 20 for count in counts[WARM_UP:])
    assert len(graphs.lines) == 2 and "room for 20 documents" in graphs.lines[1]


def test_bits_where_the_backward_pass_computes_again():
    graphs, plain = Model(True, kind=RecomputingLayer), Model(False, kind=MixingLayer)
    for seed in range(WARM_UP + 3):
        assert_equal(step(graphs, seed), step(plain, seed))
        assert_equal(graphs.gradients(), plain.gradients())
    assert graphs.by_graph == 3 * LAYERS


def test_documents_of_two_forward_passes_before_a_backward_pass():
    """The second does not take the first one's boundaries away."""
    graphs, plain = Model(True, kind=MixingLayer), Model(False, kind=MixingLayer)
    for seed in range(WARM_UP):
        for model in (graphs, plain):
            step(model, seed, cu_seqlens=boundaries(seed, 8))
    first, second = boundaries(8, 6), boundaries(9, 11)
    found = []
    for model in (graphs, plain):
        (x1, d1), (x2, d2) = batch(8), batch(9)
        y1 = model(x1, first if model is graphs else padded(first, 16))
        y2 = model(x2, second)
        y2.backward(d2)
        y1.backward(d1)
        found.append([x1.grad, x2.grad, *model.gradients()])
    assert graphs.by_graph == LAYERS
    assert_equal(*found)
