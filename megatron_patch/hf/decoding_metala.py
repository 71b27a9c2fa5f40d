"""One-token steps in one launch, for a cache that asks for it (`decoding_graph`).

A step of a small model is some hundred kernels of a few microseconds each, which take longer to
launch than to run. Recorded once per batch size in a CUDA graph, they are launched as one. For
"compiled" steps of a single row there is no need of a graph where there is a kernel that does all
of the step (`token_decoder`). Either reads and writes states that stay in place. Those of the cache
at hand are moved there when it makes its first step, and stay there, since new states are written
over the old ones; where something else has replaced them (a reordering of beams, a prompt read from
the start), they are moved there again.

Weights that change in place are seen by the next step. Anything else that changes a model (a
replaced weight, an adapter, a hook, another epsilon, another `forward` of a class) leads to a new
recording, or, where more runs than this file's rules know to be recordable, to the plain path: no
adapter and no patch is ever bypassed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.utils import logging

from .cache_metala import MetaLACache, states_lock
from .ops_metala import token_decoder

logger = logging.get_logger(__name__)

# Runs before the recording, in which kernels are compiled and chosen.
WARM_UP_RUNS = 3
# Recordings kept per model, of which each holds the states of a batch.
MAX_RECORDINGS = 4
# Matrix-vector products as generated kernels, into which their neighbours fuse.
COMPILE_OPTIONS = {"coordinate_descent_tuning": True}

# The classes of which a recordable model is made, each with the numbers that its step depends on.
_numbers: dict[type[nn.Module], tuple[str, ...]] = {}
# The code that a recorded step does not run, or not again: namespace, name, what it names, and the
# name in full.
_code: list[tuple[Mapping[str, Any], str, Any, str]] = []

# Threads that generate with one model take turns, by `states_lock`: a step's tensors are shared.
_recordings: weakref.WeakKeyDictionary[nn.Module, dict[tuple, _Recording]] = (
    weakref.WeakKeyDictionary()
)


def know_code(namespace: Mapping[str, Any], *names: str, of: str = "") -> None:
    """Says that a recorded step does what these functions do now: while others have their names, no
    step is recorded or replayed.

    Args:
        of: what a message says before their names.
    """
    _code.extend((namespace, name, namespace.get(name), of + name) for name in names)


def know_class(kind: type[nn.Module], *numbers: str) -> None:
    """Lets models have modules of a class, whose code is known from now on (see `know_code`).

    Args:
        numbers: the attributes, beside weights, that a step depends on.
    """
    _numbers[kind] = numbers
    functions = [n for n, value in vars(kind).items() if callable(value) and n != "__init__"]
    names = dict.fromkeys(["forward", "__call__", *functions])
    know_code(vars(kind), *names, of=f"{kind.__name__}.")


know_code(vars(nn.Module), "__call__", "_call_impl", of="Module.")
know_class(nn.Linear)
know_class(nn.Embedding, "max_norm")
know_class(nn.ModuleList)


def _foreign_code() -> str | None:
    """The name of a function that somebody has replaced, or `None`."""
    for namespace, name, value, full_name in _code:
        if namespace.get(name) is not value:
            return full_name
    return None


def replay_step(
    model: nn.Module, input_ids: torch.Tensor, cache: MetaLACache
) -> torch.Tensor | None:
    """Reads one token per row into the cache.

    Args:
        model: a `MetaLAForCausalLM`, in evaluation mode, under `torch.no_grad`.
        input_ids: integers [B, 1], none of them padding.
        cache: of B sequences, not empty.

    Returns:
        Logits [B, 1, vocab]; or `None`, with the cache as it was, where such a step cannot be
        recorded. A warning says why, once.
    """
    device = input_ids.device
    if not _records_on(device) or torch.is_autocast_enabled(device.type):
        return None
    with states_lock, torch.cuda.device_of(input_ids):
        recordings = _recordings.setdefault(model, {})
        key = (len(input_ids), cache.decoding_graph)
        recording = recordings.pop(key, None)
        if recording is None or not recording.model_is_unchanged():
            recording = None  # frees its memory before another is made
            while len(recordings) >= MAX_RECORDINGS:
                recordings.pop(next(iter(recordings)))
            recording = _Recording(model, input_ids, cache)
        recordings[key] = recording  # as the latest
        return recording.step(input_ids, cache)


def take_back(cache: MetaLACache) -> None:
    """Gives a cache that is to be read by itself tensors of its own where it lies on those of a
    recorded step, which another thread may take meanwhile."""
    with states_lock:
        for recordings in _recordings.values():
            for recording in recordings.values():
                if recording.owner() is cache:
                    recording.leave_owner()


def _records_on(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def record_cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Runs `step` some times, then records it; returns what replays it."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_RUNS):
            step()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # On a stream of this device: PyTorch's own lies on the device of the process's first recording,
    # and what runs on another is not recorded. Threads that read a streamed text may use the GPU
    # meanwhile.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        step()
    return graph.replay


class _Recording:
    """A step for one batch size, by a graph or a kernel; or, with `obstacle`, that there is none.

    Attributes:
        obstacle: why the model's step cannot be recorded, or `None`.
        owner: gives the cache whose states lie on the step's tensors, or `None`.
        states: of all layers, which a step reads and writes.
    """

    def __init__(self, model: nn.Module, input_ids: torch.Tensor, cache: MetaLACache):
        # What is looked at is complete in the modules' own tables: adding, removing or replacing a
        # weight, a module, a hook or an attribute (such as another `forward`) changes one of them.
        modules = list(model.modules())
        self._modules = modules[1:]  # the model itself must not be kept alive
        self._types = list(map(type, self._modules))
        self._attributes = [vars(module) for module in modules]
        tables = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        for module in modules:
            tables += (
                module._parameters,
                module._buffers,
                module._modules,
                module._forward_hooks,
                module._forward_pre_hooks,
            )
        self._foreign_code = _foreign_code()
        # Apart, for at every token all are looked at: most are empty.
        self._empty_tables = [table for table in tables if not table]
        self._tables = [table for table in tables if table]
        self._counts = list(map(len, self._attributes))
        self._values = list(chain.from_iterable(map(dict.values, self._tables)))
        self._weights = list(filter(torch.is_tensor, self._values))
        self._addresses = list(map(torch.Tensor.data_ptr, self._weights))
        self._read_numbers = [
            partial(itemgetter(*names), vars(module))
            for module in modules
            if (names := _numbers.get(type(module)))
        ]
        self._found_numbers = [read() for read in self._read_numbers]
        self.owner: Callable[[], MetaLACache | None] = lambda: None
        self.obstacle = _obstacle(model, input_ids.device)
        if self.obstacle is not None:
            logger.warning_once(f"Decoding without a CUDA graph: {self.obstacle}.")
            return

        dtype = model.lm_head.weight.dtype
        # Ordinary tensors, which may be written under `inference_mode` and outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.states = [
                (conv_state.to(dtype, copy=True), recurrent_state.clone())
                for conv_state, recurrent_state in map(cache.states, range(len(cache)))
            ]
            self._tensors = list(chain.from_iterable(self.states))
            kernel = None
            if cache.decoding_graph == "compiled" and len(input_ids) == 1:
                kernel = _kernel(model, self.states)
            # From ids to logits.
            if kernel is not None:
                self._run = _launches(kernel, model.lm_head.weight)
            else:
                self._run = self._replays(model, input_ids, cache.decoding_graph)

    def _replays(
        self, model: nn.Module, input_ids: torch.Tensor, kind: str
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The model's own layers, in a CUDA graph with tensors of its own: ids, states, logits."""
        input_ids, logits = input_ids.clone(), None
        decoder, head = model.model, model.lm_head
        block = type(decoder.layers[0]).forward
        if kind == "compiled":
            # One compilation serves all layers.
            block = torch.compile(block, dynamic=False, options=COMPILE_OPTIONS)

        arguments = (None, None, None, True, True)  # no padding, one sequence per row, in place

        def step() -> None:
            nonlocal logits
            hidden = decoder.embed(input_ids)
            for layer, states in zip(decoder.layers, self.states, strict=True):
                hidden = block(layer, hidden, *states, *arguments)[0]
            logits = head(decoder.final_norm(hidden))

        replay = record_cuda_graph(step)

        def run(ids: torch.Tensor) -> torch.Tensor:
            input_ids.copy_(ids)
            replay()
            return logits.clone()

        return run

    def model_is_unchanged(self) -> bool:
        values = chain.from_iterable(map(dict.values, self._tables))
        return (
            not any(self._empty_tables)
            and list(map(len, self._attributes)) == self._counts
            and sum(map(len, self._tables)) == len(self._values)
            and all(map(is_, values, self._values))
            and list(map(torch.Tensor.data_ptr, self._weights)) == self._addresses
            and list(map(type, self._modules)) == self._types
            and [read() for read in self._read_numbers] == self._found_numbers
            and _foreign_code() == self._foreign_code
        )

    def step(self, input_ids: torch.Tensor, cache: MetaLACache) -> torch.Tensor | None:
        """See `replay_step`."""
        if self.obstacle is not None or not self._take(cache):
            return None
        logits = self._run(input_ids)
        cache.advance(1, cache.key_padding)
        return logits

    def _take(self, cache: MetaLACache) -> bool:
        """Moves the cache's states to where the step has its own; false where they do not fit."""
        found = [tensor for layer in cache.layers for _, tensor in layer.tensors()]
        if len(found) == len(self._tensors) and all(map(is_, found, self._tensors)):
            return True
        if [x.shape for x in found] != [x.shape for x in self._tensors]:
            return False  # the plain path says what is wrong
        if self.owner() is not cache:
            self.leave_owner()
        torch._foreach_copy_(self._tensors, found)
        for layer, index in zip(cache.layers, range(len(self.states)), strict=True):
            layer.conv_states, layer.recurrent_states = self.states[index]
        self.owner = weakref.ref(cache)
        return True

    def leave_owner(self) -> None:
        """Leaves the cache that lies on the step's tensors, if any, copies of its own."""
        owner, self.owner = self.owner(), lambda: None
        if owner is not None:
            # By address: `detach_` leaves other tensors on the same memory.
            held = {tensor.data_ptr() for tensor in self._tensors}
            for layer in owner.layers:
                layer.apply(lambda x: x.clone() if x.data_ptr() in held else x)


def _launches(kernel: Any, head: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A kernel of the whole step of a single row, without a graph: it is one launch already."""

    def run(ids: torch.Tensor) -> torch.Tensor:
        # New ones at every step, of which callers keep several.
        logits = head.new_empty(1, 1, len(head))
        kernel.step(ids.to(head.device, torch.long), logits)
        return logits

    return run


def _weights(layer: nn.Module) -> dict[str, torch.Tensor | None]:
    """All weights of a layer, by the names of `token_decoder`."""
    mixer, mlp = layer.token_mixer, layer.channel_mixer
    return dict(
        token_norm=layer.token_norm.weight,
        convolution=mixer.conv1d.weight,
        q=mixer.q_proj.weight,
        gate_logits=mixer.k_gate.weight,
        v=mixer.v_proj.weight,
        out_gate=mixer.g_proj.weight,
        out_gate_bias=mixer.g_proj.bias,
        aug=mixer.aug_balance,
        out=mixer.out_proj.weight,
        channel_norm=layer.channel_norm.weight,
        l1=mlp.l1.weight,
        l1_bias=mlp.l1.bias,
        l2=mlp.l2.weight,
        l2_bias=mlp.l2.bias,
        l3=mlp.l3.weight,
        l3_bias=mlp.l3.bias,
    )


def _kernel(model: nn.Module, states: list[tuple[torch.Tensor, torch.Tensor]]) -> Any | None:
    """`token_decoder` of a model that `_obstacle` has let pass, or `None` where there is no
    kernel."""
    if model.config.norm_type == "layernorm":
        return None  # kernels have RMS norms
    decoder = model.model
    layers = [
        _weights(layer) | dict(convolution_state=conv_state, state=recurrent_state)
        for layer, (conv_state, recurrent_state) in zip(decoder.layers, states, strict=True)
    ]
    mixers = [layer.token_mixer for layer in decoder.layers]
    norms = [norm for layer in decoder.layers for norm in (layer.token_norm, layer.channel_norm)]
    numbers = {(mixer.tau, mixer.scale, mixer.norm_eps) for mixer in mixers}
    epsilons = {norm.eps for norm in (*norms, decoder.final_norm)}
    if (
        len(numbers) > 1
        or len(epsilons) > 1
        or any(layer["out_gate_bias"] is None for layer in layers)
        or decoder.embed_tokens.max_norm is not None  # the look-up changes the weights
    ):
        return None  # somebody's own
    ((tau, scale, output_norm_eps),), (norm_eps,) = numbers, epsilons
    return token_decoder(
        layers,
        decoder.embed_tokens.weight,
        decoder.final_norm.weight,
        model.lm_head.weight,
        embedding_scale=decoder.embed_scale,
        tau=tau,
        scale=scale,
        norm_eps=norm_eps,
        output_norm_eps=output_norm_eps,
    )


def _obstacle(model: nn.Module, device: torch.device) -> str | None:
    """Why the model's step cannot be recorded as `_Recording` runs it, or `None`."""
    if model.model.has_attention:
        return "found attention layers, whose keys and values grow, wanted MetaLA layers alone"
    if (name := _foreign_code()) is not None:
        return f"found {name} replaced, wanted the model's own code"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "found a hook on all modules, wanted none"
    for name, module in model.named_modules():
        if module is model:
            continue
        kind = type(module)
        if kind not in _numbers:
            return f"found a {kind.__name__} as {name}, wanted the model's own modules"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"found a hook on {name}, wanted none"
    decoder = model.model
    own = [decoder.embed_tokens.weight, decoder.final_norm.weight, model.lm_head.weight]
    own += chain.from_iterable(_weights(layer).values() for layer in decoder.layers)
    if model.config.norm_type == "layernorm":
        norms = [n for layer in decoder.layers for n in (layer.token_norm, layer.channel_norm)]
        own += [norm.bias for norm in (*norms, decoder.final_norm)]
    own = set(map(id, own))
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        if id(weight) not in own:
            return f"found {name}, wanted the weights of a MetaLA model alone"
        if type(weight) not in (nn.Parameter, torch.Tensor) or weight.device != device:
            return (
                f"found {name} as a {type(weight).__name__} on {weight.device}, wanted an ordinary "
                f"tensor on {device}, as the tokens"
            )
    return None


__all__ = ["know_class", "know_code", "replay_step", "take_back"]
