"""The parameter-free RMS norm, selected in GPT-NeoX by `norm: simplermsnorm`."""

import torch
import torch.nn.functional as F


class SimpleRMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32.

    The constructor takes GPT-NeoX's `(dim, eps)`; `dim` may be a list, of which the last entry
    counts (GPT-NeoX builds query-key norms so). There are no parameters. Input and output: [...,
    dim], any float dtype, which is kept. Source: the norm of the MetaLA authors' released models,
    eps 1e-6.
    """

    def __init__(self, dim: int | list[int], eps: float = 1e-6):
        super().__init__()
        self.dim = dim[-1] if isinstance(dim, (list, tuple)) else dim
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (self.dim,), eps=self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"
