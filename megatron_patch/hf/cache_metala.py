"""The cache of MetaLA models: states of MetaLA layers, keys and values of attention layers."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Callable, Iterator

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import cache_utils
from transformers.cache_utils import Cache
from transformers.configuration_utils import PretrainedConfig

# transformers since it has cache layers reads -1 as "no limit", before it read None.
NO_LENGTH_LIMIT = -1 if hasattr(cache_utils, "CacheLayerMixin") else None

DECODING_GRAPHS = (None, "eager", "compiled")

# Dtypes of states. Recurrent states have one of the last two.
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Held while states are read or moved. A captured decoding step, run by another thread for another
# cache, may take the tensors that hold a cache's states and leave it copies (`decoding_metala`).
states_lock = threading.RLock()


class CacheLayer:
    """Base class of a layer's part of the cache: two tensors, `None` before the first token, in the
    attributes `names`. `layer_type` is its name in `layer_types` of a configuration."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    layer_type: str
    names: tuple[str, str]

    def __init__(self) -> None:
        self.reset()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields names and tensors, without those that are `None`."""
        for name in self.names:
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor

    def __deepcopy__(self, memo: dict) -> CacheLayer:
        # torch refuses to deepcopy tensors inside an autograd graph. Clones stay in it.
        copied = type(self)()
        memo[id(self)] = copied
        with states_lock:
            for name, tensor in self.tensors():
                setattr(copied, name, tensor.clone())
        return copied

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces each tensor by `function(tensor)`."""
        with states_lock:
            for name, tensor in list(self.tensors()):
                setattr(self, name, function(tensor))

    @property
    def has_previous_state(self) -> bool:
        return getattr(self, self.names[1]) is not None

    @property
    def batch_size(self) -> int:
        """Number of sequences, -1 before the first token."""
        return next((len(tensor) for _, tensor in self.tensors()), -1)

    def get_max_length(self) -> int | None:
        return NO_LENGTH_LIMIT

    def reset(self) -> None:
        for name in self.names:
            setattr(self, name, None)


class MetaLACacheLayer(CacheLayer):
    """The state of a MetaLA layer, whose size is constant.

    Attributes:
        conv_states: [B, D, W - 1] in the model's dtype, the last inputs of the short convolution,
            oldest first.
        recurrent_states: [B, H, K, V] float32 (float64 in a float64 model).
    """

    layer_type = "linear_attention"
    names = ("conv_states", "recurrent_states")


class AttentionCacheLayer(CacheLayer):
    """Keys, already rotated, and values of an attention layer in a hybrid, both [B, key-value
    heads, tokens, width] in the model's dtype."""

    layer_type = "full_attention"
    names = ("keys", "values")


LAYER_CLASSES = {cls.layer_type: cls for cls in (MetaLACacheLayer, AttentionCacheLayer)}


def layer_types(config: PretrainedConfig) -> list[str]:
    return config.layer_types or ["linear_attention"] * config.num_hidden_layers


class MetaLACache(Cache):
    """Cache of a MetaLA model, passed and returned as `past_key_values`.

    A call with the cache continues where the last call ended, by one token or many, and updates the
    cache in place. `copy.deepcopy` forks it; `save` and `load` keep it on disk. A state cannot go
    back to an earlier token, so there is no `crop`.

    While gradients are on, the states stay in the autograd graph, so that a loss reaches through
    them into earlier calls. `detach_` cuts there (truncated backpropagation through time).

    Args:
        config: the configuration of the model. Without it, layers are added as they come.
        decoding_graph: how one-token steps run on a GPU. `None` launches kernel by kernel. "eager"
            captures the layers in a CUDA graph. "compiled" uses one fused kernel for a single row,
            if this package is installed, and otherwise a CUDA graph of compiled layers, which takes
            a minute to make for each batch size. `generate` makes such a cache with
            `cache_implementation="static"`, an "eager" one with `disable_compile=True` too.

    Attributes:
        layers: a `CacheLayer` for each layer.
        key_padding: bool [B, columns], true where keys and values hold padding, up to the last call
            that had any; `None` without padding. (MetaLA layers leave padding out.)
        last_hidden: [B, 1, D], the model's output at each row's last token, without its gradient.
            It is the result of rows that have nothing but padding in a call. `None` after a
            captured step.

    Raises:
        ValueError: `decoding_graph` is something else.
    """

    is_compileable = False
    is_croppable = False
    ROWS = ("key_padding", "last_hidden")  # the tensors [B, ...] that no layer holds

    def __init__(self, config: PretrainedConfig | None = None, decoding_graph: str | None = None):
        if decoding_graph not in DECODING_GRAPHS:
            raise ValueError(
                f"decoding_graph: found {decoding_graph!r}, wanted one of "
                f"{', '.join(map(repr, DECODING_GRAPHS))}"
            )
        # Up to transformers 4.4x the base class is a torch module with nothing else to set up.
        # Later its arguments change between releases, so the attributes that it sets are set here.
        if issubclass(Cache, torch.nn.Module):
            super().__init__()
        types = [] if config is None else layer_types(config)
        self.layers: list[CacheLayer] = [LAYER_CLASSES[name]() for name in types]
        self.key_padding: torch.Tensor | None = None
        self.last_hidden: torch.Tensor | None = None
        self.layer_class_to_replicate = None
        self.offloading = False
        self.decoding_graph = decoding_graph
        self._seen_tokens = 0

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} layers, {self.get_seq_length()} tokens, "
            f"batch {self.batch_size}, {self.nbytes} bytes)"
        )

    # Called by the model.

    def states(self, layer_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns a layer's two tensors, `None` before the first token."""
        if layer_idx >= len(self.layers):
            return None, None
        layer = self.layers[layer_idx]
        return tuple(getattr(layer, name) for name in layer.names)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Sets a layer's convolution state, [B, D, W - 1], and returns it."""
        self._layer(layer_idx).conv_states = conv_states
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int
    ) -> torch.Tensor:
        """Sets a layer's recurrent state, [B, H, K, V], and returns it."""
        self._layer(layer_idx).recurrent_states = recurrent_states
        return recurrent_states

    def update_keys_values(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sets an attention layer's keys and values of all tokens, and returns them."""
        layer = self._layer(layer_idx, AttentionCacheLayer)
        layer.keys, layer.values = keys, values
        return keys, values

    def advance(
        self,
        num_tokens: int,
        key_padding: torch.Tensor | None = None,
        last_hidden: torch.Tensor | None = None,
    ) -> None:
        """Counts the columns, padding included, that a call has read, and sets its attributes."""
        self._seen_tokens += num_tokens
        self.key_padding, self.last_hidden = key_padding, last_hidden

    def _layer(self, layer_idx: int, cls: type[CacheLayer] = MetaLACacheLayer) -> CacheLayer:
        while len(self.layers) <= layer_idx:
            self.layers.append(cls())
        return self.layers[layer_idx]

    # Called by transformers.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of columns read, padding included, which `generate` cuts off."""
        return self._seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int | None:
        """Returns that there is no limit: -1, or `None` in transformers before 4.54."""
        return NO_LENGTH_LIMIT

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int | None:
        return NO_LENGTH_LIMIT

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._seen_tokens + int(query_length), 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Returns whether a layer, by default the last, has seen a token."""
        if not self.layers:
            return False
        return self.layers[-1 if layer_idx is None else layer_idx].has_previous_state

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Returns a layer's convolution state. A layer has only one, so `state_idx` is unused."""
        return self.states(layer_idx)[0]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Returns a layer's recurrent state. A layer has only one, so `state_idx` is unused."""
        return self.states(layer_idx)[1]

    @property
    def is_linear(self) -> list[bool]:
        """For each layer, whether it keeps a state rather than keys and values."""
        return [isinstance(layer, MetaLACacheLayer) for layer in self.layers]

    @property
    def batch_size(self) -> int:
        """Number of sequences, -1 before the first token."""
        return self.layers[0].batch_size if self.layers else -1

    @property
    def nbytes(self) -> int:
        """Bytes of all states, keys and values."""
        return sum(
            t.numel() * t.element_size() for layer in self.layers for _, t in layer.tensors()
        )

    def update(self, *args, **kwargs):
        raise NotImplementedError(
            "MetaLACache appends no keys and values: call update_conv_state and "
            "update_recurrent_state, or update_keys_values"
        )

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError(
            "MetaLACache cannot be cropped: a recurrent state cannot go back to an earlier token; "
            "keep copy.deepcopy(cache) of the point to return to"
        )

    def activate_past_recording(self) -> None:
        self.crop()

    def reset(self) -> None:
        """Forgets all tokens."""
        self._seen_tokens, self.key_padding, self.last_hidden = 0, None, None
        for layer in self.layers:
            layer.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes sequence i continue what was sequence beam_idx[i]."""
        self._replace_tensors(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence, with the copies side by side."""
        self._replace_tensors(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the sequences at `indices`."""
        self._replace_tensors(lambda tensor: tensor[indices.to(tensor.device)])

    def _replace_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.layers:
            layer.apply(function)
        for name in self.ROWS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, function(tensor))

    # Called by users.

    def detach_(self) -> MetaLACache:
        """Cuts the states out of the autograd graph."""
        self._replace_tensors(torch.Tensor.detach)
        return self

    def save(self, path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
        """Writes the states, and the caller's own `metadata`, to a safetensors file for `load`. An
        existing file is replaced once the new one is complete."""
        tensors = {
            f"layers.{index}.{name}": tensor.detach().contiguous()
            for index, layer in enumerate(copy.deepcopy(self.layers))
            for name, tensor in layer.tensors()
        }
        for name in self.ROWS:
            if (tensor := getattr(self, name)) is not None:
                tensors[name] = tensor.contiguous()
        layers = ",".join(layer.layer_type for layer in self.layers)
        own = {"format": "pt", "layers": layers, "seen_tokens": str(self._seen_tokens)}
        path = os.path.realpath(path)  # a link stays, its target is replaced
        temporary = f"{path}.tmp"
        try:
            save_file(tensors, temporary, metadata={**(metadata or {}), **own})
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        device: str | torch.device = "cpu",
        config: PretrainedConfig | None = None,
    ) -> MetaLACache:
        """Reads a file that `save` has written. With `config`, the states must fit a model of this
        configuration.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is something else, its states are incomplete or invalid, or they do
                not fit `config`; names the first fault.
        """
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path}: not a saved MetaLACache: no regular file")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                # Clones, since mapped pages would change with the file, or crash if it shrinks.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a saved MetaLACache: {error}") from None
        if "seen_tokens" not in metadata or "layers" not in metadata:
            raise ValueError(f"{path}: not a saved MetaLACache")
        cache = cls()
        try:
            cache._fill(metadata, tensors)
            wrong = cache._invalid_reason()
            if not wrong and config is not None:
                wrong = cache.misfit(config)
            if wrong:
                raise ValueError(wrong)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return cache

    def _fill(self, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        """Fills an empty cache with the contents of a file. Raises a ValueError if a name is not
        one that `save` writes."""
        types = metadata["layers"].split(",") if metadata["layers"] else []
        for name in types:
            if name not in LAYER_CLASSES:
                raise ValueError(f"layers: found {name!r}, wanted {' or '.join(LAYER_CLASSES)}")
        self.layers = [LAYER_CLASSES[name]() for name in types]
        seen = metadata["seen_tokens"]
        if not (seen.isascii() and seen.isdecimal() and len(seen) < 19):
            raise ValueError(f"seen_tokens: found {seen[:40]!r}, wanted a number of tokens")
        self._seen_tokens = int(seen)
        owners = {name: (self, name) for name in self.ROWS}
        for index, layer in enumerate(self.layers):
            owners |= {f"layers.{index}.{name}": (layer, name) for name in layer.names}
        for key, tensor in tensors.items():
            if key not in owners:
                raise ValueError(f"{key}: found what no cache of {len(types)} layers has")
            setattr(*owners[key], tensor)

    def _invalid_reason(self) -> str | None:
        """Returns why no model can have left these states, in one line, or `None`."""
        rows = {name: x for name in self.ROWS if (x := getattr(self, name)) is not None}
        states = {
            f"layers.{index}.{name}": tensor
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.tensors()
        }
        for key, tensor in states.items():
            if tensor.ndim != (dimensions := 3 if key.endswith("conv_states") else 4):
                return f"{key}: found {tensor.ndim} dimensions, wanted {dimensions}"
        if not self._seen_tokens:
            key = next(iter({**states, **rows}), None)
            return None if key is None else f"{key}: found it before the first token"
        first: dict[str, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            for name in layer.names:
                key = f"layers.{index}.{name}"
                if (tensor := states.get(key)) is None:
                    return f"{key}: found none, wanted the state after {self._seen_tokens} tokens"
                like = first.setdefault("keys" if name == "values" else name, tensor)
                shape = [self.batch_size, *like.shape[1:]]
                if layer.layer_type == "full_attention":
                    shape[2] = self._seen_tokens
                if list(tensor.shape) != shape:
                    return f"{key}: found shape {list(tensor.shape)}, wanted {shape}"
                kinds = FLOATS[-2:] if name == "recurrent_states" else FLOATS
                if tensor.dtype not in kinds or tensor.dtype != like.dtype:
                    wanted = like.dtype if like.dtype in kinds else kinds[0]
                    return f"{key}: found {tensor.dtype}, wanted {wanted}"
                if not tensor.isfinite().all():
                    return f"{key}: found NaN or infinity, wanted numbers"
        padding, last = self.key_padding, self.last_hidden
        if padding is not None:
            shape = list(padding.shape)
            fits = len(shape) == 2 and shape[0] == self.batch_size and shape[1] <= self._seen_tokens
            if padding.dtype != torch.bool or not fits:
                wanted = f"torch.bool [{self.batch_size}, up to {self._seen_tokens}]"
                return f"key_padding: found {padding.dtype} {shape}, wanted {wanted}"
        if last is not None:
            fits = last.ndim == 3 and list(last.shape[:2]) == [self.batch_size, 1]
            if last.dtype not in FLOATS or not fits or not last.isfinite().all():
                found = f"{last.dtype} {list(last.shape)}"
                return f"last_hidden: found {found}, wanted numbers [{self.batch_size}, 1, width]"
        return None

    def misfit(self, config: PretrainedConfig) -> str | None:
        """Returns why the states do not fit a model of this configuration, in one line, or `None`.

        Looks at shapes only, since models call it at every step.
        """
        types = layer_types(config)
        if len(self.layers) != len(types):
            return f"found a cache of {len(self.layers)} layers, wanted {len(types)}"
        batch, heads, width = self.batch_size, config.num_attention_heads, config.head_value_dim
        keys = (batch, config.num_key_value_heads, width)
        wanted = {
            "conv_states": (batch, config.hidden_size, config.conv_width - 1),
            "recurrent_states": (batch, heads, config.head_key_dim, width),
            "keys": keys,
            "values": keys,
        }
        for index, (layer, kind) in enumerate(zip(self.layers, types, strict=True)):
            if layer.layer_type != kind:
                return f"layers.{index}: found a layer of {layer.layer_type}, wanted {kind}"
            for name in layer.names:
                tensor = getattr(layer, name)
                if tensor is None:
                    if self._seen_tokens:
                        return f"layers.{index}.{name}: found none, wanted a state"
                    continue
                shape = tuple(tensor.shape)
                if layer.layer_type == "full_attention":
                    shape = shape[:2] + shape[3:]  # without the tokens
                if shape != wanted[name]:
                    shape = list(tensor.shape)
                    return f"layers.{index}.{name}: found {shape}, wanted {list(wanted[name])}"
        if self.last_hidden is not None and self.last_hidden.shape[-1] != config.hidden_size:
            found = list(self.last_hidden.shape)
            return f"last_hidden: found {found}, wanted {[batch, 1, config.hidden_size]}"
        return None


__all__ = ["AttentionCacheLayer", "MetaLACache", "MetaLACacheLayer"]
