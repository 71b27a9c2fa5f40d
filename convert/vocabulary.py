"""The vocabulary's rows in another layout: GPT-NeoX pads the tokenizer's size to a multiple of
`make_vocab_size_divisible_by` times the tensor-parallel ranks."""

from __future__ import annotations

import sys


def padded_vocabulary(tokens: int, divisible_by: int, tensor_parallel: int) -> int:
    """Rows that GPT-NeoX gives the embedding for a tokenizer of `tokens` tokens."""
    multiple = divisible_by * tensor_parallel
    return -(-tokens // multiple) * multiple


def divisor_that_keeps(rows: int, tokens: int, tensor_parallel: int, preferred: int = 128) -> int:
    """`make_vocab_size_divisible_by` with which GPT-NeoX gives the model all its rows and the
    fewest others: a head has no bias, so new rows of zeros have logits of 0, which count in the
    loss. Rows are not taken away either: those of the padding are trained too.

    Args:
        rows: those that the model has, at least `tokens`.
        tokens: of the tokenizer.
        tensor_parallel: number of ranks of the new layout.
        preferred: the one to take where it is as good as another.
    """
    powers = [128, 64, 32, 16, 8, 4, 2, 1]
    candidates = [preferred, *powers, -(-rows // tensor_parallel)]

    def padded(divisible_by: int) -> int:
        return padded_vocabulary(tokens, divisible_by, tensor_parallel)

    return min((n for n in candidates if padded(n) >= rows), key=padded)


def tell_new_rows(added: int) -> None:
    """Says that rows were added, which no divisor could avoid."""
    if added:
        print(
            f"note: {added} new vocabulary rows of zeros, since the ranks must have equal shares: "
            "their logits are 0 and count in the loss",
            file=sys.stderr,
        )
