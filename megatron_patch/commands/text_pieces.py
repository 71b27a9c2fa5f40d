"""Cuts long texts where their tokens, taken piece by piece, are those of the whole.

The tokenizers library takes 170 to 300 bytes for each byte of a text that it encodes at once. A cut
is safe if the tokenizer splits there whatever stands before and after. So it is proven of the
pre-tokenizers that are known here; with others a text stays whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from megatron_patch.commands.documents import Document

PIECE = 2**17  # characters, from which on a cut is looked for
MAX_STRETCH = 2**22  # characters without a place to cut: about a GB of memory

# Not whitespace, nor what some version of Unicode takes for it, nor Metaspace's own mark.
_INK = r"[^\s\x1c-\x1f\u180e\u200b-\u200d\u2060\ufeff\u2581]"
# Before a space: normal forms compose nothing with it, and no word goes on across it.
BEFORE_SPACE = re.compile(rf"(?<={_INK})(?= )")
# Of words alone: before a new line too, but not after punctuation, to which patterns like GPT-4's
# join it. Letters that no normal form takes apart.
BEFORE_WHITESPACE = re.compile(rf"(?<={_INK})(?= )|(?<=[0-9A-Za-z\u4e00-\u9fa5])(?=[\n\r])")

# The alternatives of the patterns of GPT-2, GPT-4, Llama 3 and Qwen, and their variants. In what
# any of them matches, whitespace stands first, apart from new lines after punctuation; and none
# looks back, or ahead of anything but whitespace.
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
    """What finds the places where text can be cut, `None` if there are none that are sure.

    Args:
        tokenizer: from a tokenizer.json.
        special_tokens: whether it finds special tokens in text.
    """
    description = json.loads(tokenizer.to_str())
    if not _keeps_cuts(description["normalizer"]):
        return None
    cut = _cut_of(description["pre_tokenizer"])
    for token in description["added_tokens"]:
        if token["special"] and not special_tokens:
            continue
        if cut and (token["rstrip"] or cut.search(token["content"])):
            return None  # such a token may reach across
    return cut


def _parts(description: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return description[name] if description["type"] == "Sequence" else [description]


def _keeps_cuts(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None:
        return True
    return all(part["type"] in _NORMAL_FORMS for part in _parts(normalizer, "normalizers"))


def _cut_of(pre_tokenizer: dict[str, Any] | None) -> re.Pattern | None:
    """Each part of a sequence splits what the parts before have left whole: the first that splits
    at the cuts decides, if those before it look at single characters alone."""
    for part in _parts(pre_tokenizer, "pretokenizers") if pre_tokenizer else []:
        kind = part["type"]
        if kind in ("WhitespaceSplit", "Whitespace"):
            return BEFORE_WHITESPACE
        if kind == "ByteLevel" and part["use_regex"]:
            # `add_prefix_space` puts a space before a piece that starts with a new line.
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
) -> Iterator[str]:
    """The document's text in pieces of about `size` characters.

    Raises:
        ValueError: one of more than `longest` characters cannot be cut; names file and line.
    """
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
        yield text[start:end]
        start = end
