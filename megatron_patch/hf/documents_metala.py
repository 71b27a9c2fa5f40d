"""What a call's arguments say about its tokens: which are padding, and where documents begin.

Models of transformers are told in many ways. All that are known are read here, one that is not is
refused by its name: where it is overlooked, documents leak into each other without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

# Callers pass these to every model. They ask for outputs that there are not, or repeat what other
# arguments say.
UNREAD_ARGUMENTS = (
    "cache_position",
    "max_length_q",
    "max_length_k",
    "num_items_in_batch",
    "output_attentions",
    "output_router_logits",
)
# Names for the boundaries of packed sequences, of which `forward` has the first in its signature.
BOUNDARY_ARGUMENTS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")


def demand(holds: torch.Tensor, message: str) -> None:
    """Raises unless a bool tensor of one entry is true.

    Raises:
        ValueError: it is false. A compiled graph cannot look into tensors before it runs: there it
            is a RuntimeError, and on a GPU a failed assertion of the device.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Looks through the arguments that `forward` does not name.

    Raises:
        ValueError: one of them is not known, or asks for what there is not.
    """
    for name, value in arguments.items():
        if value is None or name in UNREAD_ARGUMENTS or name in BOUNDARY_ARGUMENTS:
            continue
        if name == "is_causal" and value is not False:
            continue
        if name == "token_type_ids":
            # Tokenizers write zeros where there is one type.
            demand(
                (value == value[..., :1]).all(),
                "token_type_ids: found tokens of several types in a row, wanted one: MetaLA does "
                "not read types (documents are separated by position_ids, seq_idx or cu_seqlens)",
            )
            continue
        found = value if isinstance(value, bool) else f"a {type(value).__name__}"
        raise ValueError(
            f"{name}: found {found}, wanted nothing: MetaLA does not read this argument, and "
            "without it the result may not be what was meant"
        )


def read_mask(
    mask: torch.Tensor | None, batch: int, time: int, past: int, before: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What an attention mask says about a call's tokens.

    Args:
        mask: [B, T], or with a cache [B, tokens before + T]; 0 for padding, 1 for tokens. Values
            above 1 number the documents of a row: a token belongs to another one than the token
            before it where the numbers differ.
        past: number of columns before these, 0 without a state.
        before: `key_padding` of the cache.

    Returns:
        padding: bool [B, T], true at padding, or `None` where there is none.
        numbers: [B, T], of documents, or `None` where all tokens have the same.

    Raises:
        ValueError: another shape or value.
    """
    if mask is None:
        return None, None
    shape = list(mask.shape) if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
    spare = shape[1] - time if len(shape) == 2 and shape[0] == batch else -1
    if spare < 0 or (spare > 0 and not past):
        columns = f"{time} or more (those of the tokens before first)" if past else time
        raise ValueError(f"attention_mask: found {shape}, wanted [{batch}, {columns}]")
    padding, token = mask == 0, mask == 1
    # Most masks mark nothing. Looking costs a synchronisation: a compiled graph cannot have it.
    if torch.compiler.is_compiling():
        demand(
            (padding | token).all(),
            "attention_mask: found values other than 0 and 1, wanted these under torch.compile; "
            "there, documents are separated by cu_seqlens",
        )
        return padding[:, spare:], None
    if token.all():
        return None, None
    numbers = None
    if not (padding | token).all():
        if (~(mask > 0) & ~padding).any() or (mask != mask.floor()).any():
            raise ValueError(
                "attention_mask: found values below 0 or between whole numbers, wanted 0 for "
                "padding, and 1, or the number of its document, for a token"
            )
        if past and (mask != mask.amax(1, keepdim=True)).logical_and(~padding).any():
            raise ValueError(
                "attention_mask: found several documents in a row that continues from a cache, "
                "wanted one"
            )
        numbers = mask[:, spare:]
    if spare and spare == past:
        left_out = 0 if before is None else before.sum(1)
        if (padding[:, :spare].sum(1) > left_out).any():
            raise ValueError(
                "attention_mask: found padding among the tokens before which the cache has "
                "read as tokens, as `generate` lets rows that end early read on until all "
                "have ended, wanted such rows to be read again without the cache"
            )
    padding = padding[:, spare:]
    return (padding if padding.any() else None), numbers


def tokens_first(padding: torch.Tensor) -> torch.Tensor:
    """The order, int64 [B, T], in which each row's tokens come before its padding."""
    return padding.to(torch.uint8).argsort(dim=1, stable=True)


def document_starts(
    position_ids: torch.Tensor | None,
    numbers: Iterable[torch.Tensor | None],
    padding: torch.Tensor | None,
    order: torch.Tensor | None,
) -> torch.Tensor | None:
    """Where a document begins within a row: bool [B, T - 1], for all tokens but the first, in the
    order of computation; `None` where nothing was given.

    Args:
        position_ids: [B, T]; a document begins where they do not increase. They may have gaps.
        numbers: of documents, each [B, T] or `None`; a document begins where they change.
        padding: bool [B, T], true behind each row's tokens, or `None`.
        order: int64 [B, T], the order of computation, see `tokens_first`, or `None`.
    """
    starts = None
    for values, compare in ((position_ids, torch.le), *((x, torch.ne) for x in numbers)):
        if values is None:
            continue
        if order is not None:
            values = values.gather(1, order)
        new = compare(values[:, 1:], values[:, :-1])
        starts = new if starts is None else starts | new
    if starts is not None and padding is not None:
        starts = starts & ~padding[:, 1:]
    return starts


def boundaries(starts: torch.Tensor) -> torch.Tensor | None:
    """`document_starts` as int32 [N + 1], of all rows laid end to end; `None` where each row is one
    document."""
    if not starts.any():
        return None
    rows = F.pad(starts, (1, 0), value=True).flatten()
    return F.pad(rows.nonzero()[:, 0], (0, 1), value=rows.numel()).int()


def read_boundaries(
    arguments: Mapping[str, Any], time: int, device: torch.device, look: bool
) -> torch.Tensor | None:
    """The boundaries of packed sequences, under whichever of `BOUNDARY_ARGUMENTS` they came.

    Args:
        time: T, at which the last sequence ends.
        device: where they must be.
        look: whether to read the values on a GPU too, which waits for it.

    Raises:
        ValueError: they are no int tensor [N + 1] that rises from 0 to T, or two names differ.
    """
    given = {name: x for name in BOUNDARY_ARGUMENTS if (x := arguments.get(name)) is not None}
    for name, bounds in given.items():
        wanted = f"wanted int32 or int64 [N + 1], from 0 to T = {time}, on {device}"
        if not isinstance(bounds, torch.Tensor):
            raise ValueError(f"{name}: found a {type(bounds).__name__}, {wanted}")
        if (
            bounds.ndim != 1
            or len(bounds) < 2
            or bounds.dtype not in (torch.int32, torch.int64)
            or bounds.device != device
        ):
            raise ValueError(
                f"{name}: found {bounds.dtype} {list(bounds.shape)} on {bounds.device}, {wanted}"
            )
        if torch.compiler.is_compiling() or not (look or device.type == "cpu"):
            continue
        first, last = int(bounds[0]), int(bounds[-1])
        if first != 0 or last != time or (bounds.diff() < 0).any():
            raise ValueError(
                f"{name}: found values from {first} to {last}"
                f"{', falling' if (bounds.diff() < 0).any() else ''}, {wanted}"
            )
    if not given:
        return None
    (name, bounds), *others = given.items()
    for other, values in others:
        if values.shape != bounds.shape:
            raise ValueError(f"{other}: found {len(values)} boundaries, {name} has {len(bounds)}")
        demand((values == bounds).all(), f"{other}: found other boundaries than in {name}")
    return bounds


__all__ = [
    "BOUNDARY_ARGUMENTS",
    "boundaries",
    "check_arguments",
    "document_starts",
    "read_boundaries",
    "read_mask",
    "tokens_first",
]
