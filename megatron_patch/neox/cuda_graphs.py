"""CUDA graphs of MetaLA layers: one launch for a layer's forward pass, one for its backward pass.

A layer launches about fifty kernels a step. At 2,048 tokens a GPU runs them faster than Python can
launch them. So the layers of a rank are captured after a few steps, for the shape they train on, in
the way of `torch.cuda.make_graphed_callables`, with three differences:

- A layer's output is the next layer's input where it lies, so nothing is copied between them.
- Gradients of parameters can be added where the optimizer keeps their sums.
- A call that does not fit the captured order of passes runs without graphs.

All graphs share one memory pool. A buffer in it is used again as soon as the captured order allows:
all layers forward, then all layers backward. Any other order of replays would overwrite numbers
that are still needed. `LayerGraph.fits` prevents that: after a replayed forward pass no micro-batch
is replayed until the backward pass has run, or until autograd has dropped it.

Where packed documents are kept apart, the graphs read the boundaries from one tensor of fixed size,
in which empty documents follow the last one. The first layer's replay puts those of its micro-batch
there. A micro-batch with more documents than that runs without graphs.

Where layers communicate, their collectives are captured with them. NCCL wants a collective to be
captured on all of its ranks or on none, and a graph that holds one to be launched by all of them.
So these ranks decide together, once a micro-batch: all capture, all replay, or none does.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_patch.neox.gradient_sums import GradientSums
from megatron_patch.neox.sequence_parallel import add_partial_gradients

WARM_UP = 3  # training forward passes, in which kernels are compiled and libraries choose theirs


def decide_alone(*votes: bool) -> tuple[bool, ...]:
    """Returns the votes of a rank whose layers communicate with no other."""
    return votes


class LayerGraphs:
    """The layers of one rank, in the order of their execution.

    Args:
        layers: their `compute` is what is captured: [T, B, d] to [T, B, d], with the boundaries of
            documents as a second argument, or `None`.
        sums: to which gradients of parameters are added; `None` where autograd is to get them.
        say: prints a line.
        decide: returns for each vote whether all ranks with which the layers communicate say yes.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        sums: GradientSums | None,
        say: Callable[[str], None],
        decide: Callable[..., Sequence[bool]] = decide_alone,
    ):
        self.layers, self.sums, self.say, self.decide = list(layers), sums, say, decide
        self.graphs: list[LayerGraph] = []
        self.passes = 0
        self.is_on = True
        self.replays = False  # whether this micro-batch's layers are replayed
        self.room = 0  # for documents: twice as many as the warm-up's fullest micro-batch has
        self.captured: Tensor | None = None  # the boundaries that the graphs read
        self.has_told = False

    def run(self, index: int, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor | None:
        """The output of a layer by its graph, or `None` where it has to be computed without.

        Args:
            index: the layer's place. The first layer decides for all.
            x: [T, B, d].
            cu_seqlens: int32 [N + 1], the boundaries of documents in the B rows laid end to end,
                for all layers of a micro-batch. `None` if nothing is reset.
        """
        if not (self.is_on and torch.is_grad_enabled() and x.requires_grad):
            self.replays = False
            return None
        if index == 0:
            self.replays = self._prepare(x, cu_seqlens)
        return self.graphs[index](x) if self.replays else None

    def _prepare(self, x: Tensor, cu_seqlens: Tensor | None) -> bool:
        """Returns whether a micro-batch is to be replayed, which all ranks that communicate find
        alike; captures the layers before, and puts the boundaries where the graphs read them."""
        wanted = 0 if cu_seqlens is None else 2 * (len(cu_seqlens) - 1)
        self.passes += 1
        if self.passes <= WARM_UP:
            self.room = max(self.room, wanted)
            return False
        is_captured, fits, has_room = self.decide(
            bool(self.graphs) and not any(graph.has_moved() for graph in self.graphs),
            all(graph.fits(x) for graph in self.graphs),
            self._has_room(cu_seqlens),
        )
        if not is_captured:
            self.graphs, self.room = [], max(self.room, wanted)
            fits = has_room = self._capture(x, cu_seqlens)
        elif not has_room and not self.has_told:
            self.has_told = True
            self.say(
                f"CUDA graphs have room for {self.room} documents a micro-batch; "
                "those with more run without"
            )
        if not (fits and has_room):
            return False
        if cu_seqlens is not None:
            _pad_into(self.captured, cu_seqlens)
        return True

    def _has_room(self, cu_seqlens: Tensor | None) -> bool:
        """Returns whether boundaries fit into the tensor that the graphs read."""
        if cu_seqlens is None or self.captured is None:
            return cu_seqlens is self.captured
        return len(cu_seqlens) <= len(self.captured)

    def _capture(self, x: Tensor, cu_seqlens: Tensor | None) -> bool:
        """Captures the layers. Returns whether that went well on all ranks that communicate."""
        start = time.perf_counter()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph's pool cannot use what PyTorch keeps for others
        before = torch.cuda.memory_reserved()
        self.captured = failure = None
        if cu_seqlens is not None:
            self.captured = cu_seqlens.new_empty(self.room + 1)
            _pad_into(self.captured, cu_seqlens)
        try:
            self.graphs = capture(self.layers, x, self.sums, self.captured)
        except RuntimeError as error:
            failure = str(error).splitlines()[0]
        (is_captured,) = self.decide(failure is None)
        if not is_captured:
            self.graphs, self.is_on = [], False
            self.say(f"CUDA graphs off: the capture failed ({failure or 'on another rank'})")
            return False
        torch.cuda.synchronize()
        self.say(
            f"CUDA graphs of {len(self.layers)} layers for {list(x.shape)}: "
            f"{(torch.cuda.memory_reserved() - before) / 1e9:.1f} GB, captured in "
            f"{time.perf_counter() - start:.1f} s"
        )
        return True

    def release(self) -> None:
        """Destroys the graphs. NCCL waits for that before it ends a communicator they hold."""
        for graph in self.graphs:
            graph.forward.reset()
            graph.backward.reset()
        self.graphs, self.is_on = [], False


class LayerGraph:
    """One layer's two graphs and the tensors they read and write."""

    def __init__(
        self, layer: nn.Module, x: Tensor, sums: GradientSums | None, cu_seqlens: Tensor | None
    ):
        self.layer, self.x, self.sums, self.cu_seqlens = layer, x, sums, cu_seqlens
        self.parameters = [p for p in layer.parameters() if p.requires_grad]
        self.aliases = [p.detach().requires_grad_() for p in self.parameters]
        self.addresses = self._addresses()
        self.pending: weakref.ref | None = None

    def capture_forward(self, pool: Any, stream: torch.cuda.Stream) -> None:
        with _in_place_of(self.layer, dict(zip(self.parameters, self.aliases, strict=True))):
            self.forward, self.y = _capture(
                lambda: self.layer.compute(self.x, self.cu_seqlens), pool, stream
            )

    def capture_backward(self, d_y: Tensor, pool: Any, stream: torch.cuda.Stream) -> None:
        y, self.y, self.d_y = self.y, self.y.detach(), d_y
        self.backward, (self.d_x, *self.gradients) = _capture(
            lambda: self.differentiate(y), pool, stream
        )

    def differentiate(self, y: Tensor) -> list[Tensor]:
        """Returns the gradients of the input and, unless there are sums to add them to, of the
        parameters."""
        d_x, *gradients = torch.autograd.grad(y, [self.x, *self.aliases], self.d_y)
        if self.sums is None:
            return [d_x, *gradients]
        with torch.no_grad():
            # Hooks of the parameters, which the aliases lack, add these up outside graphs.
            gradients = add_partial_gradients(self.parameters, gradients)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                self.sums.capture(parameter, gradient)
        return [d_x]

    def fits(self, x: Tensor) -> bool:
        """Returns whether x is like the captured input and the last call is over."""
        return x.shape == self.x.shape and x.dtype == self.x.dtype and not self.is_pending()

    def is_pending(self) -> bool:
        """Returns whether a replayed forward pass can still be followed by its backward pass."""
        return self.pending is not None and self.pending() is not None

    def has_moved(self) -> bool:
        """Returns whether a parameter, or the sum of its gradients, has another address now."""
        return self._addresses() != self.addresses

    def _addresses(self) -> list[int]:
        tensors = list(self.parameters)
        if self.sums is not None:
            tensors += [self.sums.of(p) for p in self.parameters]
        return [tensor.data_ptr() for tensor in tensors]

    def __call__(self, x: Tensor) -> Tensor:
        given = () if self.sums is not None else self.parameters
        return _Replay.apply(self, x, *given)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: LayerGraph, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.graph, ctx.token = graph, _Token()
        graph.pending = weakref.ref(ctx.token)
        _place(x, graph.x)
        graph.forward.replay()
        return graph.y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        graph, ctx.token = ctx.graph, None
        _place(d_y, graph.d_y)
        if graph.sums is not None:
            graph.sums.before_replay(graph.parameters)
        graph.backward.replay()
        if graph.sums is not None:
            for parameter in graph.parameters:
                graph.sums.note(parameter)
        # Autograd copies the parameters' gradients, because this object holds them too.
        return None, graph.d_x.detach(), *graph.gradients


class _Token:
    """Lives as long as a forward pass can still be followed by its backward pass."""

    __slots__ = ("__weakref__",)


@contextlib.contextmanager
def _in_place_of(module: nn.Module, aliases: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Puts other tensors of the same memory in the place of a module's parameters.

    A parameter's gradient accumulates on the stream of the training, and DeepSpeed's hooks run
    there. Work on that stream would break the capture on another one.
    """
    owners = [
        (owner._parameters, name, p)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if p in aliases
    ]
    for parameters, name, p in owners:
        parameters[name] = aliases[p]
    try:
        yield
    finally:
        for parameters, name, p in owners:
            parameters[name] = p


def _place(source: Tensor, target: Tensor) -> None:
    if source.data_ptr() != target.data_ptr() or source.stride() != target.stride():
        target.copy_(source)


def _pad_into(target: Tensor, cu_seqlens: Tensor) -> None:
    """Copies boundaries and fills the rest with the last one: empty documents."""
    count = len(cu_seqlens)
    target[:count].copy_(cu_seqlens)
    target[count:].copy_(cu_seqlens[-1:].expand(len(target) - count))


def _capture(
    work: Callable[[], Any], pool: Any, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        # Other threads, such as the one that pins batches, may go on calling CUDA.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = work()
        finally:
            graph.capture_end()
    return graph, result


def capture(
    layers: Sequence[nn.Module],
    x: Tensor,
    sums: GradientSums | None,
    cu_seqlens: Tensor | None = None,
) -> list[LayerGraph]:
    """Captures layers that run one after another on inputs like x, [T, B, d], and read the
    boundaries of documents from `cu_seqlens`.

    Raises:
        RuntimeError: CUDA or PyTorch refuses to capture something that a layer does.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graphs: list[LayerGraph] = []
    for layer in layers:
        follows = graphs and graphs[-1].layer.layer_number + 1 == layer.layer_number
        static_x = graphs[-1].y.detach() if follows else torch.empty_like(x)
        static_x = static_x.detach().requires_grad_()
        graphs.append(LayerGraph(layer, static_x, sums, cu_seqlens))
        graphs[-1].capture_forward(pool, stream)
    for graph, after in zip(reversed(graphs), [None, *reversed(graphs)], strict=False):
        follows = after is not None and graph.layer.layer_number + 1 == after.layer.layer_number
        d_y = after.d_x if follows else torch.empty_like(graph.y)
        graph.capture_backward(d_y.detach(), pool, stream)
    torch.cuda.current_stream().wait_stream(stream)
    return graphs
