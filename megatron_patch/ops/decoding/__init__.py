"""A whole model's step for one token of one sequence as one kernel launch, in CUDA C++."""

from typing import NamedTuple

from torch import Tensor


class LayerTensors(NamedTuple):
    """The weights, biases and states of a layer; `None` for those it does not have.

    D channels; H heads with keys K and values V = D / H wide; F channels in the MLP; a convolution
    over W tokens. Norms [D]; convolution [D, 1, W]; q and gate_logits [H K, D]; v, out_gate and out
    [D, D]; out_gate_bias [D]; aug [H K]; l1 and l2 [F, D] and their biases [F]; l3 [D, F] and its
    bias [D]; convolution_state [1, D, W - 1], oldest input first; state [1, H, K, V] float32.
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
