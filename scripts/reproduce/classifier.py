"""A classifier on the mean of a model's last hidden states."""

from __future__ import annotations

import torch
from torch import nn

from megatron_patch.hf import MetaLAModel

PAD = 0  # behind a sequence


class Classifier(nn.Module):
    """Maps sequences of tokens, or pairs of them, to classes.

    Args:
        body: the model.
        classes: number of classes.
        pairs: whether two sequences are read, each for itself. Their means x and y become
            (x, y, x y, x - y), which a layer with ReLU reads: a choice of Long Range Arena's.
    """

    def __init__(self, body: MetaLAModel, classes: int, pairs: bool = False):
        super().__init__()
        width = body.config.hidden_size
        self.body = body
        self.head = nn.Sequential(nn.Linear(width, classes))
        if pairs:
            self.head = nn.Sequential(
                nn.Linear(4 * width, width), nn.ReLU(), nn.Linear(width, classes)
            )
        for part in self.head:
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens [B, T], or [B, 2, T] for pairs, with PAD behind them, to logits [B,
        classes]."""
        if tokens.dim() == 2:
            return self.classify(self._mean(tokens))
        x, y = self._mean(tokens.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return self.classify(torch.cat([x, y, x * y, x - y], -1))

    def classify(self, mean: torch.Tensor) -> torch.Tensor:
        """Maps means [B, D] to logits [B, classes]."""
        return self.head(mean.to(self.head[0].weight.dtype))

    def _mean(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.body(tokens.long())[0]
        present = (tokens != PAD).to(hidden.dtype)[..., None]
        return (hidden * present).sum(1) / present.sum(1).clamp(min=1)
