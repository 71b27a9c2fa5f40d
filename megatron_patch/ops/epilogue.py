"""The parts of MetaLA that are local to one token and head, before and after the recurrence.

Shared by the backends that are written in PyTorch; arXiv 2411.10741, with the authors'
parametrisation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype to compute and to keep the state in: float64 for float64, float32 for all
    others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def decay_and_key(gate_logits: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log decay g = logsigmoid(a) / tau and key k = 1 - exp(g), both of the shape of `gate_logits`.

    `expm1` keeps the key's digits where the decay is close to one.
    """
    log_decay = F.logsigmoid(gate_logits) / tau
    return log_decay, -torch.expm1(log_decay)


def augment_norm_gate(
    read_out: torch.Tensor,
    q: torch.Tensor,
    key: torch.Tensor,
    v: torch.Tensor,
    aug: torch.Tensor | None,
    out_gate: torch.Tensor | None,
    out_gate_bias: torch.Tensor | None,
    norm_eps: float,
) -> torch.Tensor:
    """silu(out_gate + bias) * LayerNorm_V(r + sigmoid((q . (aug * k)) v)).

    Args:
        read_out: [..., H, V] r, the scaled read-out of the recurrence.
        q: [..., H, K], not scaled.
        key: [..., H, K] k = 1 - exp(log decay).
        v: [..., H, V].
        aug: [H, K], or `None` for no self-augmentation.
        out_gate: [..., H, V], or `None` for no gate.
        out_gate_bias: [H, V] added to `out_gate`, or `None`.
        norm_eps: epsilon of the LayerNorm over V, which has no affine parameters.

    Returns:
        [..., H, V]. All tensors, and this one, are of the dtype to compute in.
    """
    y = read_out
    if aug is not None:
        similarity = (q * (aug * key)).sum(-1, keepdim=True)
        y = y + torch.sigmoid(similarity * v)
    out = F.layer_norm(y, y.shape[-1:], eps=norm_eps)
    if out_gate is not None:
        out = F.silu(out_gate if out_gate_bias is None else out_gate + out_gate_bias) * out
    return out


def give_state(
    final_state: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    inplace_final_state: bool,
) -> torch.Tensor | None:
    """The state as the caller wants it: written over the initial one, as it is, or not at all."""
    if inplace_final_state:
        return initial_state.copy_(final_state)
    return final_state if output_final_state else None


def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`tensor` in `dtype`; `None` stays `None`."""
    return None if tensor is None else tensor.to(dtype)
