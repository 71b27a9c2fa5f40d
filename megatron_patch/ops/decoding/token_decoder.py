"""A whole model's step for one token of one sequence, where a kernel serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_patch.ops.backends import choose
from megatron_patch.ops.decoding import LayerTensors

if TYPE_CHECKING:
    from megatron_patch.ops.decoding.decoder import Decoder


def token_decoder(
    layers: Sequence[Mapping[str, Tensor | None]],
    embedding: Tensor,
    final_norm: Tensor | None,
    head: Tensor,
    *,
    embedding_scale: float,
    tau: float,
    scale: float,
    norm_eps: float,
    output_norm_eps: float,
) -> Decoder | None:
    """Prepares a model's step on tensors that stay where they are.

    Args:
        layers: each layer's tensors by their names in `LayerTensors`.
        embedding, head: [vocabulary, D]; the same tensor where they are tied.
        final_norm: [D], or `None` where norms have no weights.
        embedding_scale: multiplies the embedding, which is then rounded to its dtype.
        tau, scale: as in `meta_linear_attention`.
        norm_eps, output_norm_eps: of the RMS norms, and of the LayerNorm over a head's output.

    Returns:
        A decoder with `step(token, logits)`. A step reads the one entry of `token`, int64, and
        writes all states and `logits`, which is contiguous, has an entry for each of the vocabulary
        and the head's dtype. Both must be on the head's device; neither is checked. A token outside
        the vocabulary is an error of the GPU, as in PyTorch's embedding. A CUDA graph can capture a
        step, with these two tensors.

        `None` where no kernel serves the model. `megatron_patch.ops.backends` says why, except for
        layers of several shapes; tensors of several dtypes (states aside) or devices, or not
        contiguous, or not aligned to 16 bytes; and an embedding of another vocabulary than the
        head's.
    """
    layers, others = [LayerTensors(**layer) for layer in layers], (embedding, final_norm, head)
    tensors = [x for x in chain(chain.from_iterable(layers), others) if x is not None]
    states = {id(layer.state) for layer in layers}
    shapes = [[None if x is None else x.shape for x in layer] for layer in layers]
    if (
        embedding.shape != head.shape
        or any(other != shapes[0] for other in shapes)
        or any(
            x.dtype != (torch.float32 if id(x) in states else head.dtype)
            or x.device != head.device
            or not x.is_contiguous()
            or x.data_ptr() % 16
            for x in tensors
        )
    ):
        return None
    _, heads, key_width, value_width = layers[0].state.shape
    inner, dim = layers[0].l1.shape
    backend = choose(
        "token_decoder", "auto", head.dtype, head.device,
        D=dim, H=heads, K=key_width, V=value_width, F=inner,
    )  # fmt: skip
    if backend == "layers":
        return None
    from megatron_patch.ops.decoding.decoder import Decoder

    return Decoder(layers, *others, embedding_scale, scale, 1.0 / tau, norm_eps, output_norm_eps)
