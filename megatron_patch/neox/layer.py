"""The MetaLA block as a GPT-NeoX layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.model.norms import get_norm
from torch import nn

from megatron_patch.architecture_neox import from_neox
from megatron_patch.neox.mixer import MixerState, ParallelMetaLAMixer
from megatron_patch.neox.mlp import ParallelSwiGLU


class ParallelMetaLALayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): a MetaLA block with tensor-parallel projections.

    Built like GPT-NeoX's own layers from its arguments and initialisers; `neox_args.metala` holds
    the options of :class:`~megatron_patch.architecture.MetaLAOptions`. The norm is the one that
    `norm:` selects.
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
        norm, eps = get_norm(neox_args)
        self.layer_number = layer_number
        self.hidden_dropout = neox_args.hidden_dropout
        self.input_norm = norm(neox_args.hidden_size, eps=eps)
        self.mixer = ParallelMetaLAMixer(neox_args, model, init_method, output_layer_init_method)
        self.mlp_norm = norm(neox_args.hidden_size, eps=eps)
        self.mlp = ParallelSwiGLU(
            neox_args, model.intermediate_size, init_method, output_layer_init_method
        )
        # GPT-NeoX's generation switches `use_cache` on. It leaves `layer_past` where it is when it
        # switches it off again, to train or to evaluate.
        self.use_cache = False
        self.layer_past: MixerState | None = None

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[T, B, d] to [T, B, d]. `attention_mask` is not read: the recurrence is causal."""
        past = self.layer_past if self.use_cache else None
        mixed, self.layer_past = self.mixer(self.input_norm(x), past, self.use_cache)
        x = x + self._dropout(mixed)
        x = x + self._dropout(self.mlp(self.mlp_norm(x)))
        if x.requires_grad:
            # GPT-NeoX transposes what its last layer gives, and so this gradient. Left as it is in
            # memory, it would be copied before each product of each layer.
            x.register_hook(torch.Tensor.contiguous)
        return x

    def _dropout(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.hidden_dropout, self.training)


class ParallelMetaLALayerPipe(ParallelMetaLALayer):
    """The layer between pipeline stages: (hidden states, attention mask) in and out, as GPT-NeoX
    passes them along, so that attention layers of a hybrid find their mask."""

    def forward(self, args: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, attention_mask = args
        return super().forward(hidden_states), attention_mask
