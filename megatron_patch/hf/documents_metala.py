"""Reads padding and document boundaries from the arguments of a call.

Callers pass these to models of transformers in many ways. All known ways are read here. An unknown
argument is refused by name: to overlook one would let documents leak into each other silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

# Callers pass these to every model. They ask for outputs that MetaLA does not have, or repeat what
# other arguments say.
UNREAD_ARGUMENTS = (
    "cache_position",
    "max_length_q",
    "max_length_k",
    "num_items_in_batch",
    "output_attentions",
    "output_router_logits",
)
# Names of the boundaries of packed sequences. The first is in the signature of `forward`.
CU_SEQLENS_ARGUMENTS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")


def require(holds: torch.Tensor, message: str) -> None:
    """Raises a ValueError if a bool tensor of one entry is false. A compiled graph cannot look into
    tensors before it runs: it raises a RuntimeError instead, and on a GPU a device-side assertion
    fails."""
    if torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Checks the arguments that `forward` does not name. Raises a ValueError if one of them is
    unknown, or asks for something that MetaLA does not have."""
    for name, value in arguments.items():
        if value is None or name in UNREAD_ARGUMENTS or name in CU_SEQLENS_ARGUMENTS:
            continue
        if name == "is_causal" and value is not False:
            continue
        if name == "token_type_ids":
            # Tokenizers write zeros where there is only one type.
            require(
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
    mask: torch.Tensor | None, batch: int, time: int, past: int, past_padding: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Reads padding and document numbers from an attention mask.

    Args:
        mask: [B, T], or with a cache [B, past + T]; 0 for padding, 1 for tokens. Values above 1
            number the documents of a row: a document begins where the number changes.
        past: number of columns that the cache has read, 0 without a cache.
        past_padding: `key_padding` of the cache.

    Returns:
        padding: bool [B, T], true at padding, or `None` without padding.
        document_ids: [B, T], or `None` if all tokens have the same number.

    Raises:
        ValueError: the mask has another shape or other values.
    """
    if mask is None:
        return None, None
    shape = list(mask.shape) if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
    extra = shape[1] - time if len(shape) == 2 and shape[0] == batch else -1
    if extra < 0 or (extra > 0 and not past):
        columns = f"{time} or more (those of the tokens before first)" if past else time
        raise ValueError(f"attention_mask: found {shape}, wanted [{batch}, {columns}]")
    padding, token = mask == 0, mask == 1
    # Most masks mark nothing. To find out costs a synchronisation, which a compiled graph cannot
    # have.
    if torch.compiler.is_compiling():
        require(
            (padding | token).all(),
            "attention_mask: found values other than 0 and 1, wanted these under torch.compile; "
            "there, documents are separated by cu_seqlens",
        )
        return padding[:, extra:], None
    if token.all():
        return None, None
    document_ids = None
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
        document_ids = mask[:, extra:]
    if extra and extra == past:
        known = 0 if past_padding is None else past_padding.sum(1)
        if (padding[:, :extra].sum(1) > known).any():
            raise ValueError(
                "attention_mask: found padding among the tokens before which the cache has "
                "read as tokens, as `generate` lets rows that end early read on until all "
                "have ended, wanted such rows to be read again without the cache"
            )
    padding = padding[:, extra:]
    return (padding if padding.any() else None), document_ids


def without_unpredicted(
    labels: torch.Tensor, others: dict[str, Any], mask: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Returns labels [B, T], and `others` with its `shift_labels`, in which -100 takes the place of
    labels that padding in front of a row would be scored against. The model has read a mask
    [B, past + T]."""
    time = labels.shape[1]
    unread = (mask.to(labels.device) != 0).cumsum(1)[:, -time:] == 0
    labels = torch.cat([labels[:, :1], labels[:, 1:].masked_fill(unread[:, :-1], -100)], dim=1)
    if (shifted := others.get("shift_labels")) is not None:
        others = {**others, "shift_labels": shifted.masked_fill(unread.to(shifted.device), -100)}
    return labels, others


class ComputedOrder:
    """The order in which a call computes: each row's tokens before its padding; packed rows as one
    row.

    Args:
        padding: bool [B, T] as the caller gave it, or `None` without padding.
        shape: B, T.

    Attributes:
        padding: bool [B, T] in this order, or `None`.
        lengths: int64 [B], the number of tokens in each row; `None` without padding, and for packed
            rows.
        index: int64 [B, T], the order; `None` if it is that of the caller.
        ahead: bool [B, T, 1], true for padding that no token precedes; `None` without padding.
    """

    def __init__(self, padding: torch.Tensor | None, shape: tuple[int, int]):
        self.padding, self._shape, self._is_packed = padding, shape, False
        self.lengths = self.index = self.ahead = self._restore = self._results = None
        if padding is None:
            return
        self.lengths = shape[1] - padding.sum(1)
        last = (~padding).cumsum(1) - 1  # of the tokens up to each column
        self.ahead = (last < 0)[..., None]
        if shape[1] > 1:
            self.index = padding.to(torch.uint8).argsort(dim=1, stable=True)
            self._restore = self.index.argsort(dim=1)
            self._results = last.clamp(min=0)
            self.padding = padding.gather(1, self.index)

    def pack(self) -> None:
        """Makes one row of all rows, for packed documents."""
        self._is_packed, self.lengths = True, None
        self.padding = None if self.padding is None else self.padding.reshape(1, -1)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Brings x [B, T, D] into the order of computation."""
        x = _gather_rows(x, self.index)
        return x.reshape(1, -1, x.shape[-1]) if self._is_packed else x

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """Undoes `apply`."""
        return _gather_rows(self._rows(x), self._restore)

    def results(self, x: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """Undoes `apply`, and gives padding the result of the token that precedes it: the result of
        padding itself has read the tokens behind it, too.

        Args:
            before: [B, 1, D], the results of the tokens before these; `None` for zeros.
        """
        x = _gather_rows(self._rows(x), self._results)
        if self.ahead is None:
            return x
        before = x.new_zeros(()) if before is None else before.to(x)
        return torch.where(self.ahead.to(x.device), before, x)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*self._shape, -1) if self._is_packed else x


def _gather_rows(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Returns x [B, T, D] with the tokens `index` [B, T] of each row; x itself for `None`. Blocks
    may lie on other devices than the mask."""
    return x if index is None else x.gather(1, index.to(x.device)[..., None].expand_as(x))


def for_each_token(
    name: str, values: torch.Tensor | None, batch: int, time: int
) -> torch.Tensor | None:
    """Expands an argument of shape [B, T] or [1, T] to [B, T]. Raises a ValueError if it has
    another shape; names the argument."""
    if values is None:
        return None
    if (shape := list(values.shape)) not in ([1, time], [batch, time]):
        raise ValueError(f"{name}: found {shape}, wanted [{batch}, {time}]")
    return values.expand(batch, -1)


def document_starts(
    position_ids: torch.Tensor | None,
    document_ids: Iterable[torch.Tensor | None],
    padding: torch.Tensor | None,
    order: torch.Tensor | None,
) -> torch.Tensor | None:
    """Finds where documents begin within rows: bool [B, T - 1] for all tokens but the first, in the
    order of computation. `None` if nothing was given.

    Args:
        position_ids: [B, T] or `None`. A document begins where they do not increase; gaps are
            allowed.
        document_ids: tensors [B, T] or `None`. A document begins where they change.
        padding: bool [B, T], true behind each row's tokens, or `None`.
        order: int64 [B, T], the order of computation (see `ComputedOrder`), or `None`.
    """
    starts = None
    for values, compare in ((position_ids, torch.le), *((x, torch.ne) for x in document_ids)):
        if values is None:
            continue
        if order is not None:
            values = values.gather(1, order)
        new = compare(values[:, 1:], values[:, :-1])
        starts = new if starts is None else starts | new
    if starts is not None and padding is not None:
        starts = starts & ~padding[:, 1:]
    return starts


def find_cu_seqlens(
    arguments: Mapping[str, Any],
    starts: torch.Tensor | None,
    inputs: torch.Tensor,
    padded: bool,
    continued: bool,
    check_values: bool,
) -> torch.Tensor | None:
    """Finds the boundaries of the documents in a call: int [N + 1] of the B rows laid end to end,
    or `None` if each row is one document. Raises a ValueError if the arguments contradict each
    other, or need a row of their own.

    Args:
        arguments: the call's, which may hold some of `CU_SEQLENS_ARGUMENTS`.
        starts: what `document_starts` returns.
        inputs: [B, T] or [B, T, D], for shape and device.
        padded: whether the call has padding.
        continued: whether the call continues from a cache.
        check_values: whether to read given boundaries on a GPU too, which waits for it.
    """
    batch, time = inputs.shape[:2]
    name = next((name for name in CU_SEQLENS_ARGUMENTS if arguments.get(name) is not None), None)
    if name is None:
        if starts is None or time == 1:
            return None
        if continued:
            require(
                ~starts.any(),
                "position_ids, seq_idx: found a document that begins within a call that continues "
                "from a cache, wanted the tokens of one document a row",
            )
            return None
        if not starts.any():
            return None
        rows = F.pad(starts, (1, 0), value=True).flatten()
        return F.pad(rows.nonzero()[:, 0], (0, 1), value=rows.numel()).int()
    if batch != 1 or padded or continued:
        raise ValueError(
            f"{name}: found with batch {batch}, padding {padded} and a continued cache "
            f"{continued}, wanted one row with neither"
        )
    cu_seqlens = read_cu_seqlens(arguments, time, inputs.device, check_values)
    if starts is not None and not torch.compiler.is_compiling():
        begins = starts.new_zeros(time + 1).index_fill(0, cu_seqlens.long(), True)
        if (starts[0] & ~begins[1:time]).any():
            raise ValueError(
                f"position_ids, seq_idx, attention_mask: found a document that begins where "
                f"{name} has no boundary, wanted all of them to say the same"
            )
    return cu_seqlens


def read_cu_seqlens(
    arguments: Mapping[str, Any], time: int, device: torch.device, check_values: bool
) -> torch.Tensor:
    """Reads the boundaries of packed sequences from one or more of `CU_SEQLENS_ARGUMENTS`. With
    `check_values` it reads the values on a GPU too, and waits for it. Raises a ValueError if they
    are no int tensor [N + 1] on `device` that rises from 0 to T, or two names differ."""
    given = {name: x for name in CU_SEQLENS_ARGUMENTS if (x := arguments.get(name)) is not None}
    for name, cu_seqlens in given.items():
        wanted = f"wanted int32 or int64 [N + 1], from 0 to T = {time}, on {device}"
        if not isinstance(cu_seqlens, torch.Tensor):
            raise ValueError(f"{name}: found a {type(cu_seqlens).__name__}, {wanted}")
        if (
            cu_seqlens.ndim != 1
            or len(cu_seqlens) < 2
            or cu_seqlens.dtype not in (torch.int32, torch.int64)
            or cu_seqlens.device != device
        ):
            found = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}"
            raise ValueError(f"{name}: found {found}, {wanted}")
        if torch.compiler.is_compiling() or not (check_values or device.type == "cpu"):
            continue
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        falling = ", falling" if (cu_seqlens.diff() < 0).any() else ""
        if first != 0 or last != time or falling:
            raise ValueError(f"{name}: found values from {first} to {last}{falling}, {wanted}")
    (name, cu_seqlens), *others = given.items()
    for other, values in others:
        if values.shape != cu_seqlens.shape:
            raise ValueError(
                f"{other}: found {len(values)} boundaries, {name} has {len(cu_seqlens)}"
            )
        require((values == cu_seqlens).all(), f"{other}: found other boundaries than in {name}")
    return cu_seqlens
