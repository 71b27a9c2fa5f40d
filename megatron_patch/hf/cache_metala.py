"""What a MetaLA model carries from token to token, as a transformers cache."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import cache_utils
from transformers.cache_utils import Cache
from transformers.configuration_utils import PretrainedConfig

# How a cache without a length limit says so: -1 since transformers has cache layers, None before.
NO_LENGTH_LIMIT = -1 if hasattr(cache_utils, "CacheLayerMixin") else None

DECODING_GRAPHS = (None, "eager", "compiled")

# Held while states are read or moved: a recorded step, run by another thread for another cache, may
# take the tensors in which a cache's states lie, and leave it copies (`decoding_metala`).
states_lock = threading.RLock()


class CacheLayer:
    """What a layer keeps of all tokens so far: two tensors, `None` before the first token.

    Attributes:
        layer_type: what `layer_types` of a configuration calls it.
        names: the names of the two tensors, as attributes.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    layer_type: str
    names: tuple[str, str]

    def __init__(self) -> None:
        self.reset()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The names and tensors held now."""
        for name in self.names:
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor

    def __deepcopy__(self, memo: dict) -> CacheLayer:
        # torch refuses to copy tensors inside an autograd graph; clones stay in it.
        copied = type(self)()
        memo[id(self)] = copied
        with states_lock:
            for name, tensor in self.tensors():
                setattr(copied, name, tensor.clone())
        return copied

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces each tensor by `function` of it."""
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
    """State of a MetaLA layer, of constant size.

    Attributes:
        conv_states: [B, D, W - 1], the last inputs of the short convolution, oldest first, in the
            model's dtype.
        recurrent_states: [B, H, K, V] float32 (float64 in a float64 model).
    """

    layer_type = "linear_attention"
    names = ("conv_states", "recurrent_states")


class AttentionCacheLayer(CacheLayer):
    """Keys and values of an attention layer in a hybrid, which grow with every token.

    Attributes:
        keys: [B, H, tokens, width], already rotated, in the model's dtype; H heads of keys and
            values.
        values: the same shape.
    """

    layer_type = "full_attention"
    names = ("keys", "values")


LAYER_CLASSES = {cls.layer_type: cls for cls in (MetaLACacheLayer, AttentionCacheLayer)}


class MetaLACache(Cache):
    """Cache of a MetaLA model, passed and returned as `past_key_values`.

    The size of a MetaLA layer's state does not depend on the number of tokens; attention layers of
    a hybrid keep keys and values beside it. A model call with the cache continues where the last
    call ended, with one token or many, and updates it in place; `copy.deepcopy` forks it, `save`
    and `load` keep it on disk. A state cannot be taken back to an earlier token, so there is no
    `crop`.

    The states stay in the autograd graph where gradients are on, so that a loss reaches through
    them into the calls before; `detach_` cuts there (truncated backpropagation through time).

    Args:
        config: whose layers the cache takes; without it, layers are added as they come.
        decoding_graph: "compiled" or "eager" lets one-token steps on a GPU be launched as a whole,
            see `decoding_metala`: for a single row one kernel, where this package is installed, for
            more a CUDA graph of compiled layers, which takes a minute once per batch size; or a
            graph of the layers' own kernels. `None` runs every step by itself. `generate` makes
            such a cache by `cache_implementation="static"`, "eager" with `disable_compile=True`.

    Attributes:
        layers: a `CacheLayer` for each layer.
        key_padding: bool [B, columns], true where keys and values hold padding, which MetaLA layers
            have left out, up to the last call that had any; `None` where there is none.
        last_hidden: [B, 1, D], what the model gave at each row's last token, without its gradient,
            for rows of which a call has nothing but padding; `None` after a recorded step.

    Raises:
        ValueError: `decoding_graph` is something else.
    """

    is_compileable = False
    is_croppable = False
    ROWS = ("key_padding", "last_hidden")  # tensors of all rows beside the layers'

    def __init__(self, config: PretrainedConfig | None = None, decoding_graph: str | None = None):
        if decoding_graph not in DECODING_GRAPHS:
            raise ValueError(
                f"decoding_graph: found {decoding_graph!r}, wanted one of "
                f"{', '.join(map(repr, DECODING_GRAPHS))}"
            )
        # Up to transformers 4.4x the base class is a torch module with nothing else to set up;
        # later it takes arguments that have changed between releases, and sets the attributes
        # below.
        if issubclass(Cache, torch.nn.Module):
            super().__init__()
        types: list[str] = []
        if config is not None:
            types = config.layer_types or ["linear_attention"] * config.num_hidden_layers
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

    # What the model calls.

    def states(self, layer_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """A layer's two tensors, `None` before the first token."""
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
        """Counts the columns that a model call has read, padding included, and takes
        `key_padding` and `last_hidden` after it."""
        self._seen_tokens += num_tokens
        self.key_padding, self.last_hidden = key_padding, last_hidden

    def _layer(self, layer_idx: int, cls: type[CacheLayer] = MetaLACacheLayer) -> CacheLayer:
        while len(self.layers) <= layer_idx:
            self.layers.append(cls())
        return self.layers[layer_idx]

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, padding included: what `generate` cuts its inputs by."""
        return self._seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int | None:
        """No limit (-1, or `None` in transformers before 4.54)."""
        return NO_LENGTH_LIMIT

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int | None:
        return NO_LENGTH_LIMIT

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._seen_tokens + int(query_length), 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether a layer (the last by default) has seen a token."""
        if not self.layers:
            return False
        return self.layers[-1 if layer_idx is None else layer_idx].has_previous_state

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A layer's convolution state; the layer has one, `state_idx` 0."""
        return self.states(layer_idx)[0]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A layer's recurrent state; the layer has one, `state_idx` 0."""
        return self.states(layer_idx)[1]

    @property
    def is_linear(self) -> list[bool]:
        """Which layers keep a state rather than keys and values."""
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
        """Repeats each sequence, the copies side by side."""
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

    # What a user asks of it.

    def detach_(self) -> MetaLACache:
        """Cuts the states from the autograd graph."""
        self._replace_tensors(torch.Tensor.detach)
        return self

    def save(self, path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
        """Writes the states to a safetensors file, from which `load` resumes.

        Args:
            path: the file.
            metadata: text of the caller's to keep beside the states, under names of its own.
        """
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
        save_file(tensors, path, metadata={**(metadata or {}), **own})

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> MetaLACache:
        """Reads a file that `save` has written.

        Raises:
            ValueError: the file is a safetensors file of something else.
        """
        cache = cls()
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if "seen_tokens" not in metadata or "layers" not in metadata:
                raise ValueError(f"{path}: not a saved MetaLACache")
            types = metadata["layers"].split(",") if metadata["layers"] else []
            cache.layers = [LAYER_CLASSES[name]() for name in types]
            for key in file.keys():
                if key in cls.ROWS:
                    setattr(cache, key, file.get_tensor(key))
                    continue
                _, index, name = key.split(".")
                setattr(cache.layers[int(index)], name, file.get_tensor(key))
        cache._seen_tokens = int(metadata["seen_tokens"])
        return cache


__all__ = ["AttentionCacheLayer", "MetaLACache", "MetaLACacheLayer"]
