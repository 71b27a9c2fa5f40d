"""The MetaLA block as a GPT-NeoX layer, with its norm and its MLP. The token mixer is in mixer.py.

Hidden states are [s, b, h]: sequence, batch, hidden size, as everywhere in GPT-NeoX.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron import mpu
from megatron.model import norms
from torch import nn

from megatron_patch.architecture import METALA, MetaLAOptions
from megatron_patch.architecture_neox import from_neox
from megatron_patch.neox import documents
from megatron_patch.neox.mixer import MixerState, ParallelMetaLAMixer
from megatron_patch.neox.recompute import Compute, recomputed
from megatron_patch.neox.sequence_parallel import column_parallel, row_parallel_sum
from megatron_patch.neox.token_groups import is_sequence_parallel
from megatron_patch.ops import add_rms_norm, swiglu, swiglu_linear


class SimpleRMSNorm(nn.Module):
    """Parameter-free RMS norm, x / sqrt(mean(x^2) + eps) over the last dimension. GPT-NeoX selects
    it by `norm: simplermsnorm`.

    The constructor takes GPT-NeoX's `(dim, eps)`. `dim` may be a list, as for query-key norms; its
    last entry counts. Input and output are [..., dim] in any float dtype. Source: the norm of the
    MetaLA authors' released models.
    """

    def __init__(self, dim: int | list[int], eps: float = 1e-6):
        super().__init__()
        self.dim = dim[-1] if isinstance(dim, (list, tuple)) else dim
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # PyTorch computes 16-bit inputs in float32 here, as the authors do.
        return F.rms_norm(x, (self.dim,), eps=self.eps)

    def of_sum(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x + residual and its norm, in one pass where there is a kernel for it."""
        return add_rms_norm(x, residual, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class ParallelSwiGLU(nn.Module):
    """The MLP of a MetaLA block, w2(silu(w1 x) * w3 x), without biases.

    w1 and w3 are one column-parallel matrix, `gate_up_proj` [2f, h], so that the backward pass
    all-reduces the gradient of x once. Each tensor-parallel rank holds its rows of w1, then its
    rows of w3. w2 is the row-parallel `down_proj` [h, f]. f is `intermediate_size` as it is set;
    GPT-NeoX's own gated MLP takes a third of it.
    """

    def __init__(
        self,
        neox_args,
        intermediate_size: int,
        init_method: Callable[[torch.Tensor], object],
        output_layer_init_method: Callable[[torch.Tensor], object],
    ):
        super().__init__()
        self.recompute = MetaLAOptions.parse(neox_args.metala).recompute != "nothing"
        self.is_gathered = neox_args.zero_stage == 3  # down_proj's weight, in its own forward pass
        self.gate_up_proj = mpu.ColumnParallelLinear(
            neox_args=neox_args,
            input_size=neox_args.hidden_size,
            output_size=2 * intermediate_size,
            gather_output=False,
            init_method=init_method,
            stride=2,  # splits w1 and w3 separately over the ranks
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

    def forward(self, x: torch.Tensor, again: Compute | None = None) -> torch.Tensor:
        """Maps [s, b, h] to [s, b, h]; input and output are identical on all tensor-parallel
        ranks, or with sequence parallelism each rank's tokens. `again` computes x again; without it
        x is kept for the backward pass."""
        gate_and_up = column_parallel(self.gate_up_proj, x, not self.recompute, again)
        if self.recompute and not self.is_gathered:
            product = swiglu_linear(gate_and_up, self.down_proj.weight)
            return row_parallel_sum(self.down_proj, product)
        hidden = swiglu(gate_and_up)
        activate = partial(swiglu, gate_and_up.detach()) if self.recompute else None
        with recomputed(hidden, activate, self.down_proj.weight):
            return self.down_proj(hidden)[0]


class ParallelMetaLALayer(nn.Module):
    """A MetaLA block with pre-norms: x + mixer(norm(x)), then x + mlp(norm(x)).

    It is built like GPT-NeoX's own layers, from the settings and two initialisers. The keys under
    `metala:` are those of :class:`~megatron_patch.architecture.MetaLAOptions`; `norm:` selects the
    norm.
    """

    def __init__(
        self,
        neox_args,
        init_method: Callable[[torch.Tensor], object],
        output_layer_init_method: Callable[[torch.Tensor], object],
        layer_number: int,
    ):
        super().__init__()
        model = from_neox(neox_args)
        if model.metala.init == "authors":
            init_method = output_layer_init_method = partial(
                nn.init.normal_, std=neox_args.init_method_std
            )
        norm, eps = norms.get_norm(neox_args)
        self.layer_number = layer_number
        self.hidden_dropout = neox_args.hidden_dropout
        self.input_norm = norm(neox_args.hidden_size, eps=eps)
        self.mixer = ParallelMetaLAMixer(neox_args, model, init_method, output_layer_init_method)
        self.mlp_norm = norm(neox_args.hidden_size, eps=eps)
        self.mlp = ParallelSwiGLU(
            neox_args, model.intermediate_size, init_method, output_layer_init_method
        )
        # ZeRO 3 gathers a norm's weights for its forward pass alone.
        self.recompute = model.metala.recompute != "nothing" and neox_args.zero_stage != 3
        self.resets = model.metala.reset_at_document
        # GPT-NeoX's generation sets `use_cache`. When it unsets it again, to train or to evaluate,
        # `layer_past` still holds the last state, so `compute` reads both.
        self.use_cache = False
        self.layer_past: MixerState | None = None
        self.is_split = is_sequence_parallel(neox_args)
        # Attention layers want [s, b, h] in memory, and pipeline stages send only such tensors.
        next_type = neox_args.attention_config[layer_number + 1 : layer_number + 2]
        in_pipeline = neox_args.pipe_parallel_size > 1
        self.is_batch_first = not in_pipeline and next_type in ([], [METALA])
        self.graphs, self.index = None, 0  # CUDA graphs of all layers, and which of them this is

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Maps hidden states [s, b, h] to [s, b, h]. It reads `attention_mask` for the boundaries
        of documents alone (`documents.py`): the recurrence is causal. A generation, which sets
        `use_cache`, takes its prompt for one document."""
        cu_seqlens = None
        if self.resets and not self.use_cache:
            parts = mpu.get_model_parallel_world_size() if self.is_split else 1
            cu_seqlens = documents.boundaries_of(attention_mask, x.shape[1], parts * x.shape[0])
        if self.graphs is not None and self.training and not self.use_cache:
            if (y := self.graphs.run(self.index, x, cu_seqlens)) is not None:
                return y
        return self.compute(x, cu_seqlens)

    def compute(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the layer without CUDA graphs; `cu_seqlens` bounds the documents of the b rows laid
        end to end.

        The convolution and the operator want [b, s, h] in memory, so the layer works in that order.
        Between MetaLA layers the hidden states stay so, seen as [s, b, h], and nothing is
        transposed. With sequence parallelism the layer works in [s, b, h], whose slices of tokens
        are what ranks exchange.
        """
        past = self.layer_past if self.use_cache else None
        x = x.contiguous() if self.is_split else x.transpose(0, 1).contiguous()
        x, normed = self._add_and_norm(x, None, self.input_norm)
        mixed, self.layer_past = self.mixer(
            normed,
            past,
            self.use_cache,
            cu_seqlens,
            self._norm_again(x, self.input_norm),
        )
        x, normed = self._add_and_norm(x, self._dropout(mixed), self.mlp_norm)
        x = x + self._dropout(self.mlp(normed, self._norm_again(x, self.mlp_norm)))
        if x.requires_grad:
            # An attention layer returns a gradient that is transposed in memory. Without this one
            # copy, each matrix product of this layer would copy it again.
            x.register_hook(torch.Tensor.contiguous)
        y = x if self.is_split else x.transpose(0, 1)
        return y if self.is_batch_first else y.contiguous()

    @staticmethod
    def _add_and_norm(
        x: torch.Tensor, residual: torch.Tensor | None, norm: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x + residual and its norm."""
        if isinstance(norm, SimpleRMSNorm):
            return norm.of_sum(x, residual)
        x = x if residual is None else x + residual
        return x, norm(x)

    def _norm_again(self, x: torch.Tensor, norm: nn.Module) -> Compute | None:
        """Returns what computes the norm of x in the backward pass, `None` where it is kept."""
        if not self.recompute:
            return None
        x = x.detach()
        return lambda: self._add_and_norm(x, None, norm)[1]

    def _dropout(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.hidden_dropout, self.training)


class ParallelMetaLALayerPipe(ParallelMetaLALayer):
    """The layer with GPT-NeoX's pipeline signature: (hidden states, attention mask) in and out. It
    passes the mask on to the attention layers of a hybrid."""

    def forward(self, args: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, attention_mask = args
        return super().forward(hidden_states, attention_mask), attention_mask
