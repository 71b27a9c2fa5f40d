"""A model with weighted RMS norms as the same model with the authors' parameter-free ones: each
norm's scale goes into the weights that its output meets first, channel by channel."""

from __future__ import annotations

from dataclasses import replace

import torch

from convert.command import ConvertError
from convert.neox_checkpoint import NeoXCheckpoint
from convert.tensor_table import TensorRule
from megatron_patch.architecture import Architecture

# Which norm's scale multiplies the channels of a tensor, and along which of its dimensions they
# lie. Before the projections of a mixer stands the depthwise convolution, without a bias.
FOLDED_INTO = {
    "mixer.conv1d.weight": ("input_norm.scale", 0),
    "mlp.gate_up_proj.weight": ("mlp_norm.scale", 1),
    "attention.query_key_value.weight": ("input_layernorm.scale", 1),
    "mlp.linear1.weight": ("post_attention_layernorm.scale", 1),
    "final_linear.weight": ("norm.scale", 1),
}


class FoldedNorms:
    """A checkpoint's tensors with the scales of its norms folded in.

    Attributes:
        shape: the model's shape, its norms parameter-free.

    Raises:
        ConvertError: the head is tied to the embedding, so that no weights of its own follow the
            last norm.
    """

    def __init__(self, source: NeoXCheckpoint):
        if source.shape.norm == "layernorm":
            raise ConvertError(
                "--fold-norms: norm: found 'layernorm', whose mean no weights can take away, "
                "wanted rmsnorm"
            )
        if source.shape.norm == "rmsnorm" and source.shape.tied:
            raise ConvertError(
                "--fold-norms: no_weight_tying is false: the last norm's scale cannot go into the "
                "embedding, which the head shares"
            )
        self._source = source
        self._scales = {
            (rule.layer, rule.name): rule
            for rule in source.table
            if rule.name in {scale for scale, _ in FOLDED_INTO.values()}
        }
        # The last norm is a layer of its own, the head the one after it.
        self._scales |= {
            (layer + 1, name): rule
            for (layer, name), rule in self._scales.items()
            if name == "norm.scale"
        }
        folded = {self._scale_rule(rule) for rule in source.table}
        for rule in source.table:
            if rule.name.endswith(".scale") and rule not in folded:
                raise ConvertError(f"--fold-norms: layer {rule.layer}: no place for {rule.name}")
        self.shape: Architecture = replace(source.shape, norm="simplermsnorm")

    def is_folded(self, rule: TensorRule) -> bool:
        """Whether a scale goes into the tensor."""
        return self._scale_rule(rule) is not None

    def full(self, rule: TensorRule, out: torch.Tensor | None = None) -> torch.Tensor:
        """As `NeoXCheckpoint.full`; a tensor with a scale folded in is float32, to be rounded
        once."""
        tensor = self._source.full(rule, out)
        scale_rule = self._scale_rule(rule)
        if scale_rule is None:
            return tensor
        scale = self._source.full(scale_rule).float()
        along = [1] * tensor.ndim
        along[FOLDED_INTO[rule.name][1]] = -1
        return tensor.float() * scale.view(along)

    def _scale_rule(self, rule: TensorRule) -> TensorRule | None:
        if rule.name not in FOLDED_INTO:
            return None
        return self._scales.get((rule.layer, FOLDED_INTO[rule.name][0]))
