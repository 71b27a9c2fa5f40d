"""The tensor-parallel SwiGLU MLP of a MetaLA block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron import mpu

from megatron_patch.ops import swiglu


class ParallelSwiGLU(torch.nn.Module):
    """w2(silu(w1 x) * w3 x), without biases.

    w1 and w3 are one column-parallel matrix, `gate_up_proj` [2f, d], so that the backward pass
    all-reduces the input gradient once. Each tensor-parallel rank holds its rows of w1, then its
    rows of w3. GPT-NeoX's own gated MLP takes a third of `intermediate_size`; this one takes it
    as it is.
    """

    def __init__(
        self,
        neox_args,
        intermediate_size: int,
        init_method: Callable[[torch.Tensor], object],
        output_layer_init_method: Callable[[torch.Tensor], object],
    ):
        super().__init__()
        self.gate_up_proj = mpu.ColumnParallelLinear(
            neox_args=neox_args,
            input_size=neox_args.hidden_size,
            output_size=2 * intermediate_size,
            gather_output=False,
            init_method=init_method,
            stride=2,  # w1 and w3 are split each on its own
            bias=False,
        )
        self.down_proj = mpu.RowParallelLinear(
            neox_args=neox_args,
            input_size=intermediate_size,
            output_size=neox_args.hidden_size,
            input_is_parallel=True,
            init_method=output_layer_init_method,
            bias=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] to [..., d], identical on all tensor-parallel ranks."""
        return self.down_proj(swiglu(self.gate_up_proj(x)[0]))[0]
