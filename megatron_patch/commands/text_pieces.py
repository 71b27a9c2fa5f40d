"""Cuts long texts into pieces whose tokens, joined, are those of the whole text.

The tokenizers library takes 170 to 300 bytes of memory for each byte of a text that it encodes at
once. A cut is safe if the tokenizer splits there whatever comes before and after. That is known for
the pre-tokenizers listed here; with others a text is not cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from megatron_patch.commands.documents import Document

PIECE = 2**17  # characters in a piece, up to the next place to cut
MAX_STRETCH = 2**22  # most characters without a place to cut: about 1 GB of memory

# A character that no version of Unicode calls whitespace, and that is not Metaspace's mark.
_INK = r"[^\s\x1c-\x1f\u180e\u200b-\u200d\u2060\ufeff\u2581]"
# A cut before a space: no normal form composes a character with it, and no word crosses it.
BEFORE_SPACE = re.compile(rf"(?<={_INK})(?= )")
# A cut before a space or, after a letter or digit, before a new line. After punctuation a new line
# is no cut, because patterns like GPT-4's join the two. The letters are some that no normal form
# decomposes.
BEFORE_WHITESPACE = re.compile(rf"(?<={_INK})(?= )|(?<=[0-9A-Za-z\u4e00-\u9fa5])(?=[\n\r])")

# The alternatives in the split patterns of GPT-2, GPT-4, Llama 3, Qwen and their variants. Each
# matches whitespace only at its start, except new lines after punctuation, and none has a
# lookbehind, or a lookahead for anything but whitespace.
_ALTERNATIVES = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'(?:[sdmt]|ll|ve|re)"),
    *("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:[sdmt]|ll|ve|re)", "'(?i:[sdmt]|ll|ve|re)"),
    *(r" ?\p{L}+", r"\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+"),
    *(r" ?\p{N}+", r"\p{N}+", r"\p{N}", r"\p{N}{1,3}"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*"),
    *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"),
}
_BETWEEN_ALTERNATIVES = re.compile(r"\|(?![^(]*\))")
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def safe_cut(tokenizer: Tokenizer, special_tokens: bool) -> re.Pattern | None:
    """Returns a pattern that finds the places where a text can be cut, or `None` where no cut is
    known to be safe. `special_tokens` says whether the tokenizer finds special tokens in text."""
    description = json.loads(tokenizer.to_str())
    if not _keeps_cuts(description["normalizer"]):
        return None
    cut = _cut_of(description["pre_tokenizer"])
    for token in description["added_tokens"]:
        if token["special"] and not special_tokens:
            continue
        if cut and (token["rstrip"] or cut.search(token["content"])):
            return None  # this token can cross a cut
    return cut


def _parts(description: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return description[name] if description["type"] == "Sequence" else [description]


def _keeps_cuts(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None:
        return True
    return all(part["type"] in _NORMAL_FORMS for part in _parts(normalizer, "normalizers"))


def _cut_of(pre_tokenizer: dict[str, Any] | None) -> re.Pattern | None:
    """Returns the cuts of a pre-tokenizer. Each part of a sequence splits further what the parts
    before it left together, so the first part that splits at the cuts decides. Parts before it may
    only look at single characters (Digits)."""
    for part in _parts(pre_tokenizer, "pretokenizers") if pre_tokenizer else []:
        kind = part["type"]
        if kind in ("WhitespaceSplit", "Whitespace"):
            return BEFORE_WHITESPACE
        if kind == "ByteLevel" and part["use_regex"]:
            # `add_prefix_space` would put a space before a piece that starts with a new line.
            return BEFORE_SPACE if part["add_prefix_space"] else BEFORE_WHITESPACE
        if kind == "Metaspace" and part.get("split", True):
            return BEFORE_SPACE
        if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            alternatives = set(_BETWEEN_ALTERNATIVES.split(part["pattern"].get("Regex", "")))
            return BEFORE_WHITESPACE if r"\s+" in alternatives <= _ALTERNATIVES else None
        if kind != "Digits":
            return None
    return None


def pieces(
    document: Document, cut: re.Pattern | None, size: int = PIECE, longest: int = MAX_STRETCH
) -> Iterator[tuple[str, bool]]:
    """Yields a document's text in pieces of about `size` characters, each with whether it is the
    last. Raises a ValueError if more than `longest` characters have no place to cut; names file and
    line."""
    text, start = document.text, 0
    size = max(1, min(size, longest // 2))
    while start < len(text):
        found = cut.search(text, start + size) if cut else None
        end = found.start() if found else len(text)
        if end - start > longest:
            raise ValueError(
                f"{document.origin}: found {end - start:,} characters that this tokenizer has to "
                f"take at once, wanted at most {longest:,} (--max-stretch; each takes about 300 "
                "bytes of memory)"
            )
        yield text[start:end], end == len(text)
        start = end
