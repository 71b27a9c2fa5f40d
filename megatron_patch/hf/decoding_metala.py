"""One-token decoding steps in a single launch, for caches that ask for it (`decoding_graph`).

A step of a small model is some hundred kernels of a few microseconds each, which take longer to
launch than to run. A step is therefore captured once per batch size, in one of two ways: as a CUDA
graph of the model's layers, or, for "compiled" steps of a single row, as the fused kernel
`token_decoder` where there is one. Either reads and writes states at fixed addresses. The first
step of a cache moves the cache's states there, where they stay, since new states overwrite old
ones. If something replaces them (a reordering of beams, a prompt read from the start), the next
step moves them there again.

A captured step sees weights that change in place. Any other change of the model (a replaced weight,
an adapter, a hook, another epsilon, another `forward` of a class) leads to a new capture, or, if
the model runs code that is not registered here, to the plain path. No adapter and no patch is ever
bypassed.
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

# Runs before the capture, in which kernels are compiled and chosen.
WARM_UP_RUNS = 3
# Captured steps kept per model. Each holds the states of a batch.
MAX_CAPTURED_STEPS = 4
# Generates matrix-vector products as kernels, into which their neighbours fuse.
COMPILE_OPTIONS = {"coordinate_descent_tuning": True}

# Classes whose modules a captured model may have, with the attributes, beside weights, that their
# step depends on.
_class_attributes: dict[type[nn.Module], tuple[str, ...]] = {}
# Functions that a captured step replaces: namespace, name, the function, and its full name.
_functions: list[tuple[Mapping[str, Any], str, Any, str]] = []

# `states_lock` serialises threads that generate with one model, since they share a step's tensors.
_captured_steps: weakref.WeakKeyDictionary[nn.Module, dict[tuple, _CapturedStep]] = (
    weakref.WeakKeyDictionary()
)


def register_functions(namespace: Mapping[str, Any], *names: str, prefix: str = "") -> None:
    """Registers functions, by their names in a namespace, that a captured step replaces. Messages
    write `prefix` before a name.

    Steps are neither captured nor replayed while one of these names refers to another function.
    """
    _functions.extend((namespace, name, namespace.get(name), prefix + name) for name in names)


def register_class(cls: type[nn.Module], *attributes: str) -> None:
    """Allows modules of a class in captured models, and registers its methods. `attributes` names
    the attributes, beside weights, that a step depends on."""
    _class_attributes[cls] = attributes
    methods = [name for name, x in vars(cls).items() if callable(x) and name != "__init__"]
    names = dict.fromkeys(["forward", "__call__", *methods])
    register_functions(vars(cls), *names, prefix=f"{cls.__name__}.")


register_functions(vars(nn.Module), "__call__", "_call_impl", prefix="Module.")
register_class(nn.Linear)
register_class(nn.Embedding, "max_norm")
register_class(nn.ModuleList)


def _replaced_function() -> str | None:
    """Returns the full name of a registered function that was replaced, or `None`."""
    for namespace, name, function, full_name in _functions:
        if namespace.get(name) is not function:
            return full_name
    return None


def replay_step(
    model: nn.Module, input_ids: torch.Tensor, cache: MetaLACache
) -> torch.Tensor | None:
    """Reads one token per row into the cache by a captured step, which it captures first if needed.

    Args:
        model: a `MetaLAForCausalLM` in evaluation mode, under `torch.no_grad`.
        input_ids: integers [B, 1], none of them padding.
        cache: holds the states of B sequences.

    Returns:
        Logits [B, 1, vocab]. `None`, with the cache as it was, if the step cannot be captured; the
            reason is logged once.
    """
    device = input_ids.device
    if not _can_capture_on(device) or torch.is_autocast_enabled(device.type):
        return None
    with states_lock, torch.cuda.device_of(input_ids):
        steps = _captured_steps.setdefault(model, {})
        key = (len(input_ids), cache.decoding_graph)
        step = steps.pop(key, None)
        if step is None or not step.snapshot.is_current():
            step = None  # frees its memory before another is made
            while len(steps) >= MAX_CAPTURED_STEPS:
                steps.pop(next(iter(steps)))
            step = _CapturedStep(model, input_ids, cache)
        steps[key] = step  # as the most recently used
        return step.run(input_ids, cache)


def detach_from_graph(cache: MetaLACache) -> None:
    """Gives a cache its own copies of states that lie on the tensors of a captured step.

    The plain path calls this first, since another thread may take the step's tensors meanwhile.
    """
    with states_lock:
        for steps in _captured_steps.values():
            for step in steps.values():
                if step.owner() is cache:
                    step.release_owner()


def _can_capture_on(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def capture_cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Runs `step` a few times, then captures it as a CUDA graph; returns what replays the graph."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_RUNS):
            step()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # On a stream of this device: PyTorch's default capture stream stays on the device of the first
    # capture in the process. "thread_local", so that other threads may use the GPU meanwhile.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        step()
    return graph.replay


class _ModelSnapshot:
    """Everything that a captured step depends on, to detect changes of the model.

    Adding, removing or replacing a weight, a module, a hook or an attribute (such as another
    `forward`) changes one of the dictionaries of a module. All are looked at for every token, so
    the checks run in C loops, and the many empty dictionaries are kept apart.
    """

    def __init__(self, model: nn.Module):
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
        self._replaced_function = _replaced_function()
        self._empty_tables = [table for table in tables if not table]
        self._tables = [table for table in tables if table]
        self._counts = list(map(len, self._attributes))
        self._values = list(chain.from_iterable(map(dict.values, self._tables)))
        self._weights = list(filter(torch.is_tensor, self._values))
        self._addresses = list(map(torch.Tensor.data_ptr, self._weights))
        self._getters = [
            partial(itemgetter(*names), vars(module))
            for module in modules
            if (names := _class_attributes.get(type(module)))
        ]
        self._numbers = [get() for get in self._getters]

    def is_current(self) -> bool:
        """Returns whether the model is as it was."""
        values = chain.from_iterable(map(dict.values, self._tables))
        return (
            not any(self._empty_tables)
            and list(map(len, self._attributes)) == self._counts
            and sum(map(len, self._tables)) == len(self._values)
            and all(map(is_, values, self._values))
            and list(map(torch.Tensor.data_ptr, self._weights)) == self._addresses
            and list(map(type, self._modules)) == self._types
            and [get() for get in self._getters] == self._numbers
            and _replaced_function() == self._replaced_function
        )


class _CapturedStep:
    """The step of a model for one batch size, as a CUDA graph or a fused kernel.

    Attributes:
        snapshot: of the model, to find out whether it has changed.
        unsupported_reason: why the step cannot be captured, or `None`.
        owner: returns the cache whose states lie on the step's tensors, or `None`.
        states: the states of all layers, which a step reads and writes.
    """

    def __init__(self, model: nn.Module, input_ids: torch.Tensor, cache: MetaLACache):
        self.snapshot = _ModelSnapshot(model)
        self.owner: Callable[[], MetaLACache | None] = lambda: None
        self.unsupported_reason = _unsupported_reason(model, input_ids.device)
        if self.unsupported_reason is not None:
            logger.warning_once(f"Decoding without a CUDA graph: {self.unsupported_reason}.")
            return

        dtype = model.lm_head.weight.dtype
        # Ordinary tensors, which can be written inside and outside of `inference_mode`.
        with torch.inference_mode(False), torch.no_grad():
            self.states = [
                (conv_state.to(dtype, copy=True), recurrent_state.clone())
                for conv_state, recurrent_state in map(cache.states, range(len(cache)))
            ]
            self._tensors = list(chain.from_iterable(self.states))
            decoder = None
            if cache.decoding_graph == "compiled" and len(input_ids) == 1:
                decoder = make_token_decoder(model, self.states)
            # Each maps input_ids to logits.
            if decoder is not None:
                self._compute_logits = partial(_launch, decoder, model.lm_head.weight)
            else:
                self._compute_logits = self._capture(model, input_ids, cache.decoding_graph)

    def _capture(
        self, model: nn.Module, input_ids: torch.Tensor, kind: str
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Captures the model's own layers in a CUDA graph, with static input and output."""
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

        replay = capture_cuda_graph(step)

        def compute_logits(ids: torch.Tensor) -> torch.Tensor:
            input_ids.copy_(ids)
            replay()
            return logits.clone()

        return compute_logits

    def run(self, input_ids: torch.Tensor, cache: MetaLACache) -> torch.Tensor | None:
        """Runs the step, see `replay_step`."""
        if self.unsupported_reason is not None or not self._move_states(cache):
            return None
        logits = self._compute_logits(input_ids)
        cache.advance(1, cache.key_padding)
        return logits

    def _move_states(self, cache: MetaLACache) -> bool:
        """Moves the cache's states onto the step's tensors; returns false if they do not fit."""
        found = [tensor for layer in cache.layers for _, tensor in layer.tensors()]
        if len(found) == len(self._tensors) and all(map(is_, found, self._tensors)):
            return True
        if [x.shape for x in found] != [x.shape for x in self._tensors]:
            return False  # the plain path raises the error
        if self.owner() is not cache:
            self.release_owner()
        torch._foreach_copy_(self._tensors, found)
        for layer, states in zip(cache.layers, self.states, strict=True):
            layer.conv_states, layer.recurrent_states = states
        self.owner = weakref.ref(cache)
        return True

    def release_owner(self) -> None:
        """Gives the cache that lies on the step's tensors, if any, copies of its own."""
        owner, self.owner = self.owner(), lambda: None
        if owner is not None:
            # By address, since `detach_` leaves other tensors on the same memory.
            held = {tensor.data_ptr() for tensor in self._tensors}
            for layer in owner.layers:
                layer.apply(lambda x: x.clone() if x.data_ptr() in held else x)


def _launch(decoder: Any, head: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Launches a fused kernel, which needs no graph. The logits are a new tensor at every step,
    since callers keep several."""
    logits = head.new_empty(1, 1, len(head))
    decoder.step(ids.to(head.device, torch.long), logits)
    return logits


def _layer_weights(layer: nn.Module) -> dict[str, torch.Tensor | None]:
    """Returns all weights and biases of a layer under the names of `token_decoder`."""
    mixer, mlp = layer.token_mixer, layer.channel_mixer
    projections = (mixer.q_proj, mixer.k_gate, mixer.v_proj, mixer.g_proj, mixer.out_proj)
    modules = dict(zip(("q", "gate_logits", "v", "out_gate", "out"), projections, strict=True))
    modules |= dict(l1=mlp.l1, l2=mlp.l2, l3=mlp.l3, convolution=mixer.conv1d)
    modules |= dict(token_norm=layer.token_norm, channel_norm=layer.channel_norm)
    weights = {name: module.weight for name, module in modules.items()}
    biases = {f"{name}_bias": modules[name].bias for name in ("out_gate", "l1", "l2", "l3")}
    return weights | biases | {"aug": mixer.aug_balance}


def make_token_decoder(
    model: nn.Module, states: list[tuple[torch.Tensor, torch.Tensor]]
) -> Any | None:
    """Makes the fused kernel of a whole step of a single row, or returns `None` if no kernel serves
    the model. Steps read and overwrite `states`, each layer's convolution state and recurrent
    state."""
    if model.config.norm_type == "layernorm":
        return None  # the kernel has RMS norms
    decoder = model.model
    layers = [
        _layer_weights(layer) | dict(convolution_state=conv_state, state=recurrent_state)
        for layer, (conv_state, recurrent_state) in zip(decoder.layers, states, strict=True)
    ]
    mixers = [layer.token_mixer for layer in decoder.layers]
    numbers = {(mixer.tau, mixer.scale, mixer.norm_eps) for mixer in mixers}
    epsilons = {norm.eps for norm in _norms(decoder)}
    if (
        len(numbers) > 1
        or len(epsilons) > 1
        or any(layer["out_gate_bias"] is None for layer in layers)
        or decoder.embed_tokens.max_norm is not None  # the look-up changes the weights
    ):
        return None  # somebody changed the model
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


def _norms(decoder: nn.Module) -> list[nn.Module]:
    norms = [norm for layer in decoder.layers for norm in (layer.token_norm, layer.channel_norm)]
    return [*norms, decoder.final_norm]


def _unsupported_reason(model: nn.Module, device: torch.device) -> str | None:
    """Returns why the model's step cannot be captured, or `None`."""
    if model.model.has_attention:
        return "found attention layers, whose keys and values grow, wanted MetaLA layers alone"
    if (name := _replaced_function()) is not None:
        return f"found {name} replaced, wanted the model's own code"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "found a hook on all modules, wanted none"
    for name, module in model.named_modules():
        if module is model:
            continue
        cls = type(module)
        if cls not in _class_attributes:
            return f"found a {cls.__name__} as {name}, wanted the model's own modules"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"found a hook on {name}, wanted none"
    decoder = model.model
    weights = [decoder.embed_tokens.weight, decoder.final_norm.weight, model.lm_head.weight]
    weights += chain.from_iterable(_layer_weights(layer).values() for layer in decoder.layers)
    if model.config.norm_type == "layernorm":
        weights += [norm.bias for norm in _norms(decoder)]
    known = set(map(id, weights))
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        if id(weight) not in known:
            return f"found {name}, wanted the weights of a MetaLA model alone"
        if type(weight) not in (nn.Parameter, torch.Tensor) or weight.device != device:
            return (
                f"found {name} as a {type(weight).__name__} on {weight.device}, wanted an ordinary "
                f"tensor on {device}, as the tokens"
            )
    return None
