"""A whole decoder's step for one token of one sequence, where there is a kernel for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megatron_patch.ops.backends import choose, interpreted, unsupported_reason

if TYPE_CHECKING:
    from megatron_patch.ops import decoding, triton


class LayerTensors(NamedTuple):
    """A layer's weights, biases and states; `None` for what it does not have.

    D channels, H heads with keys of any width K and values V = D / H wide, an MLP of F channels, a
    convolution of W taps. Norms [D]; convolution [D, 1, W]; q and gate_logits [H K, D]; v,
    out_gate and out [D, D]; out_gate_bias [D]; aug [H K]; l1 and l2 [F, D], l3 [D, F], their
    biases [F], [F], [D]; convolution_state [1, D, W - 1], oldest input first; state [1, H, K, V]
    in float32.
    """

    token_norm: Tensor | None
    convolution: Tensor
    q: Tensor
    gate_logits: Tensor
    v: Tensor
    out_gate: Tensor
    out_gate_bias: Tensor
    aug: Tensor | None
    out: Tensor
    channel_norm: Tensor | None
    l1: Tensor
    l1_bias: Tensor | None
    l2: Tensor
    l2_bias: Tensor | None
    l3: Tensor
    l3_bias: Tensor | None
    convolution_state: Tensor
    state: Tensor


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
) -> decoding.decoder.Decoder | triton.decoder.Decoder | None:
    """A decoder's step on tensors that stay where they are.

    Args:
        layers: each layer's tensors by their names in `LayerTensors`.
        embedding, head: [vocabulary, D]; one tensor where they are tied.
        final_norm: [D], or `None` where norms have no weights.
        embedding_scale: what the embedding is multiplied by, and then rounded to its dtype.
        tau, scale: as in `meta_linear_attention`.
        norm_eps, output_norm_eps: of the RMS norms, and of the LayerNorm over a head's output.

    Returns:
        What has `step(token, logits)`, which reads the one entry of `token`, int64, and writes
        `logits`, contiguous, of as many entries as the vocabulary in the head's dtype, and all
        states. Both are on the head's device, and nothing of them is checked; a token outside the
        vocabulary is an error of the GPU, as in PyTorch's look-up. A step can be recorded in a CUDA
        graph, with these two tensors.

        `None` where no kernel does it: what `megatron_patch.ops.backends` says, layers of several
        shapes, tensors of several dtypes (but the states) or devices, not contiguous, or not from a
        multiple of 16 bytes on, an embedding of another vocabulary than the head's.
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
    numbers = (embedding_scale, scale, 1.0 / tau, norm_eps, output_norm_eps)
    _, heads, key_width, value_width = layers[0].state.shape
    inner, dim = layers[0].l1.shape
    call = dict(
        dtype=head.dtype, device=head.device, D=dim, H=heads, K=key_width, V=value_width, F=inner
    )
    if interpreted(head.dtype):
        missing = unsupported_reason("token_decoder", "triton", **call)
        backend = "triton" if missing is None else "layers"
    else:
        backend = choose("token_decoder", "auto", **call)
    if backend == "layers":
        return None
    if backend == "cuda":
        from megatron_patch.ops.decoding.decoder import Decoder
    else:
        from megatron_patch.ops.triton.decoder import Decoder
    return Decoder(layers, *others, *numbers)


__all__ = ["token_decoder"]
