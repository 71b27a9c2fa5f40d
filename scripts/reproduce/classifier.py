"""A classifier on the mean of a MetaLA model's last hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megatron_patch.hf.modeling_metala import MetaLAModel


class Classifier(nn.Module):
    """Maps sequences to classes.

    Args:
        body: the model.
        classes: number of classes.
    """

    def __init__(self, body: MetaLAModel, classes: int):
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.config.hidden_size, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, present: torch.Tensor | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        """Returns logits [B, classes] of the body's inputs. `present`, bool [B, T], marks the
        tokens whose states count; `None` for all."""
        hidden = self.body(**inputs)[0].to(self.head.weight.dtype)
        if present is None:
            mean = hidden.mean(1)
        else:
            weight = present.to(hidden.dtype)[..., None]
            mean = (hidden * weight).sum(1) / weight.sum(1)
        return self.head(mean)


@torch.no_grad()
def accuracy(
    model: nn.Module, logits_of: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor,
    batch_size: int,
) -> float:  # fmt: skip
    """Returns the fraction of labels [N] that are the likeliest class.

    Args:
        logits_of: maps indices of examples, int64 [B], to the model's logits.
    """
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=labels.device)
    for index in torch.arange(len(labels), device=labels.device).split(batch_size):
        right += (logits_of(index).argmax(-1) == labels[index]).sum()
    model.train()
    return int(right) / len(labels)
