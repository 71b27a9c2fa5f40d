"""Where chunks and segments lie when sequences are packed, without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """Units (chunks or segments) of all sequences, numbered in order.

    chunks, segments: how many each sequence has, or 0 for packed sequences.
    chunk_count, segment_count: of all sequences; for packed ones an upper bound, since their number
        is known to the device alone. Units beyond the last have sequence -1.
    chunk_table, segment_table: [count, 2] int32, each unit's sequence and its index within it.
    chunk_bounds, segment_bounds: [N + 1] int32, the first unit of each sequence.
    """

    sequences: int
    chunks: int
    segments: int
    chunk_count: int
    segment_count: int
    chunk_table: torch.Tensor | None = None
    segment_table: torch.Tensor | None = None
    chunk_bounds: torch.Tensor | None = None
    segment_bounds: torch.Tensor | None = None


def unit_count(batch: int, time: int, size: int, cu_seqlens: torch.Tensor | None) -> int:
    """How many units of `size` tokens B sequences of T tokens have, or at most those that
    `cu_seqlens` packs."""
    if cu_seqlens is None:
        return batch * -(-time // size)
    return time // size + cu_seqlens.shape[0] - 1


def lay_out(
    batch: int, time: int, chunk: int, segment: int, cu_seqlens: torch.Tensor | None
) -> Layout:
    """The layout of B sequences of T tokens, or of those that `cu_seqlens` packs."""
    chunk_count = unit_count(batch, time, chunk, cu_seqlens)
    segment_count = unit_count(batch, time, segment, cu_seqlens)
    if cu_seqlens is None:
        return Layout(
            batch, chunk_count // batch, segment_count // batch, chunk_count, segment_count
        )
    bounds = cu_seqlens.long()
    sequences = len(bounds) - 1
    lengths = bounds.diff()
    chunk_bounds = _bounds((lengths + chunk - 1) // chunk)
    segment_bounds = _bounds((lengths + segment - 1) // segment)
    return Layout(
        sequences, 0, 0, chunk_count, segment_count,
        _table(chunk_bounds, chunk_count), _table(segment_bounds, segment_count),
        chunk_bounds.int(), segment_bounds.int(),
    )  # fmt: skip


def _bounds(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _table(bounds: torch.Tensor, count: int) -> torch.Tensor:
    """Sequence, or -1 past the last, and index within it, of units 0 .. count - 1."""
    unit = torch.arange(count, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:], unit, right=True)
    known = sequence < len(bounds) - 1
    sequence = torch.where(known, sequence, 0)
    index = unit - bounds[sequence]
    return torch.stack([torch.where(known, sequence, -1), index], 1).int()
