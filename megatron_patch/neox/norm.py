"""The parameter-free RMS norm, selected in GPT-NeoX by `norm: simplermsnorm`."""

import torch
import torch.nn.functional as F


class SimpleRMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension.

    The constructor takes GPT-NeoX's `(dim, eps)`; `dim` may be a list, of which the last entry
    counts (GPT-NeoX builds query-key norms so). There are no parameters. Input and output are
    [..., dim] in any float dtype. Source: the norm of the MetaLA authors' released models.
    """

    def __init__(self, dim: int | list[int], eps: float = 1e-6):
        super().__init__()
        self.dim = dim[-1] if isinstance(dim, (list, tuple)) else dim
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # PyTorch computes 16-bit inputs in float32 here, as the authors do.
        return F.rms_norm(x, (self.dim,), eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"
