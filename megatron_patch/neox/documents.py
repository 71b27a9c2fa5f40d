"""Documents of packed samples, for `metala: {reset_at_document: true}`.

GPT-NeoX cuts a stream of documents into samples. Each document ends with an end-of-document token.
With the setting, a token sees its own document alone: the state and the convolution of MetaLA
layers begin anew after each such token, and a hybrid's attention has a block-diagonal causal mask.

The boundaries take the attention mask's place in the batch, because GPT-NeoX hands that from layer
to layer and from one pipeline stage to the next, as bool of a fixed shape. Without attention layers
it is [B, 1, 1, T], true where a document begins; with them it is their mask [B, 1, T, T], true
where a query may not see a key, and a document begins where a token may not see the one before it.
Each stage turns it into `cu_seqlens` of the B rows laid end to end, once a micro-batch.

Where ranks split the tokens, each has the `cu_seqlens` of its own part of the rows. A rank makes
them without the others; `ops/context_parallel.py` says what it hands on. Context parallelism splits
the boundaries with the batch. With sequence parallelism the mask is that of the tokens which a
layer gathers, and its convolution alone, which reads a part of them, has boundaries of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_patch.architecture import MetaLAOptions, SettingsError
from megatron_patch.neox.fast_step import say
from megatron_patch.neox.token_groups import context_group, place_in, token_group


class Boundaries(NamedTuple):
    """`cu_seqlens` of a layer's tokens, int32 [N + 1], for B rows that are laid end to end: those
    of the recurrence, and those of the convolution."""

    recurrence: Tensor | None = None
    convolution: Tensor | None = None


def resets(neox_args: Any) -> bool:
    """Returns whether the run has `metala: {reset_at_document: true}`."""
    return MetaLAOptions.parse(neox_args.metala).reset_at_document


def find_starts(tokens: Tensor, eod: int | None) -> Tensor:
    """Returns where documents begin in samples [B, T]: bool, true for the first token of a row and
    for each token behind `eod`. Raises a SettingsError if the tokenizer has no such token."""
    if eod is None:
        raise SettingsError(
            "metala.reset_at_document: found true with a tokenizer that has no end-of-document "
            "token, wanted one with <|endoftext|>"
        )
    return F.pad(tokens[:, :-1] == eod, (1, 0), value=True)


def attention_mask(starts: Tensor, causal: Tensor) -> Tensor:
    """Returns the block-diagonal causal mask, bool [B, 1, T, T], true where a query may not see a
    key, from `causal`, the mask [1, 1, T, T] of whole rows."""
    document = starts.cumsum(1)
    return causal | (document[:, None, :, None] != document[:, None, None, :])


def positions(starts: Tensor) -> Tensor:
    """Returns the position of each token in its document, int64 [B, T]."""
    place = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return place - torch.where(starts, place, 0).cummax(1).values


def pack(starts: Tensor) -> Boundaries:
    """Returns the boundaries of documents that begin at `starts`, bool [B, T], in the tokens that
    this rank has after an input projection. Waits for the device, since only the values say how
    many there are."""
    (rank, ranks), (part, parts) = place_in(context_group()), place_in(token_group())
    cu_seqlens = _pack(starts, rank > 0)
    if parts == ranks:
        return Boundaries(cu_seqlens, cu_seqlens)
    of_part = starts.chunk(parts // ranks, dim=1)[part % (parts // ranks)]
    return Boundaries(cu_seqlens, _pack(of_part, part > 0))


def _pack(starts: Tensor, goes_on: bool) -> Tensor:
    """Returns `cu_seqlens` of the documents in a part of each row. `goes_on` is true behind the
    first part: a row's first sequence is then the document before, and possibly empty."""
    rows, time = starts.shape
    row, column = F.pad(starts, (1, 0), value=goes_on).nonzero().unbind(1)
    positions = row * time + (column - 1).clamp(min=0)
    return F.pad(positions, (0, 1), value=rows * time).int()


# The last mask, what tells it from others, and its boundaries. All layers of a stage read one mask,
# though checkpointing gives each of them another tensor object; its memory tells that it is the
# same. The mask is kept, so that no other one can take its memory.
_last: tuple[Tensor, tuple, Boundaries] | None = None
# Masks so far in which no document ended, `None` after one in which one did.
_without_end: int | None = 0
TOLD_AFTER = 100


def remember(mask: Tensor, batch: int, boundaries: Boundaries) -> None:
    """Keeps the boundaries in B rows and the mask that layers read next.

    Says so if no document ends in the first hundred masks: GPT-NeoX's `preprocess_data.py` writes
    no ends by default.
    """
    global _last, _without_end
    _last = mask, _identity(mask, batch), boundaries
    if _without_end is None:
        return
    _without_end = _without_end + 1 if len(boundaries.recurrence) - 1 == batch else None
    if _without_end == TOLD_AFTER:
        say(
            "metala.reset_at_document: found no end-of-document token in the first batches; "
            "preprocess_data.py writes them with --append-eod"
        )


def boundaries_of(mask: Tensor | None, batch: int, time: int) -> Boundaries:
    """Returns the boundaries of documents that a mask holds, for B rows of a layer's T tokens laid
    end to end, or `Boundaries()` if each row is one document. It waits for the device once a
    micro-batch, unless the boundaries were remembered."""
    (_, ranks), (_, parts) = place_in(context_group()), place_in(token_group())
    time *= parts // ranks
    if mask is None or time == 1 or mask.shape[-1] != time:
        return Boundaries()
    if mask.is_inference():  # such tensors have no version
        return pack(_starts_in(mask, batch))
    if _last is None or _last[1] != _identity(mask, batch):
        remember(mask, batch, pack(_starts_in(mask, batch)))
    return _last[2]


def _identity(mask: Tensor, batch: int) -> tuple:
    return mask.data_ptr(), mask.shape, mask._version, mask.device, batch


def _starts_in(mask: Tensor, batch: int) -> Tensor:
    if mask.shape[-2] == 1:
        starts = mask[:, 0, 0]
    else:
        starts = F.pad(mask[:, 0].diagonal(-1, 1, 2), (1, 0), value=True)
    return starts.expand(batch, -1)
