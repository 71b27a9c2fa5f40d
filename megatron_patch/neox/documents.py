"""Documents of packed samples, for `metala: {reset_at_document: true}`.

GPT-NeoX cuts a stream of documents into samples. Each document ends with an end-of-document token.
With the setting, a token sees its own document alone: the state and the convolution of MetaLA
layers begin anew after each such token, and a hybrid's attention has a block-diagonal causal mask.

The boundaries take the attention mask's place in the batch, because GPT-NeoX hands that from layer
to layer and from one pipeline stage to the next, as bool of a fixed shape. Without attention layers
it is [B, 1, 1, T], true where a document begins; with them it is their mask [B, 1, T, T], true
where a query may not see a key, and a document begins where a token may not see the one before it.
Each stage turns it into `cu_seqlens` of the B rows laid end to end, once a micro-batch.

Context parallelism splits the boundaries with the batch: each rank has the `cu_seqlens` of its own
part of the rows. It makes them without the others; `ops/context_parallel.py` says what it hands on.
With sequence parallelism the boundaries are those of the tokens which a layer gathers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_patch.architecture import MetaLAOptions, SettingsError
from megatron_patch.neox.notices import say
from megatron_patch.neox.token_groups import context_group, place_in


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


def pack(starts: Tensor) -> Tensor:
    """Returns the boundaries of documents that begin at `starts`, bool [B, T]: `cu_seqlens`, int32
    [N + 1], of the B rows laid end to end. With context parallelism these are this rank's part of
    each row, and behind the first part a row's first sequence is the document before, which may end
    there. Waits for the device, since only the values say how many there are."""
    rows, time = starts.shape
    goes_on = place_in(context_group())[0] > 0
    row, column = F.pad(starts, (1, 0), value=goes_on).nonzero().unbind(1)
    positions = row * time + (column - 1).clamp(min=0)
    return F.pad(positions, (0, 1), value=rows * time).int()


# The last mask, what tells it from others, and its boundaries. All layers of a stage read one mask,
# though checkpointing gives each of them another tensor object; its memory tells that it is the
# same. The mask is kept, so that no other one can take its memory.
_last: tuple[Tensor, tuple, Tensor] | None = None
# Masks so far in which no document ended, `None` after one in which one did.
_without_end: int | None = 0
TOLD_AFTER = 100


def remember(mask: Tensor, batch: int, boundaries: Tensor) -> None:
    """Keeps the boundaries in B rows and the mask that layers read next.

    Says so if no document ends in the first hundred masks: GPT-NeoX's `preprocess_data.py` writes
    no ends by default.
    """
    global _last, _without_end
    _last = mask, _identity(mask, batch), boundaries
    if _without_end is None:
        return
    _without_end = _without_end + 1 if len(boundaries) - 1 == batch else None
    if _without_end == TOLD_AFTER:
        say(
            "metala.reset_at_document: found no end-of-document token in the first batches; "
            "preprocess_data.py writes them with --append-eod"
        )


def boundaries_of(mask: Tensor | None, batch: int, time: int) -> Tensor | None:
    """Returns the boundaries of documents that a mask holds, for B rows of the T tokens that a
    layer's convolution reads, laid end to end, or `None` if each row is one document. It waits for
    the device once a micro-batch, unless the boundaries were remembered."""
    if mask is None or time == 1 or mask.shape[-1] != time:
        return None
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
