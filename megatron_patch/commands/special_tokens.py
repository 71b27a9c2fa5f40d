"""Encodes text in which special tokens are text: `<|endoftext|>` on a web page ends no document."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unicode noncharacters, which are reserved for use inside programs and do not occur in texts.
TYPED, REAL, END = "\ufdd0", "\ufdd1", "\ufdd2"


def any_of(contents: Iterable[str]) -> re.Pattern:
    """Returns a pattern that finds these tokens in a text; the longest one wins."""
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def special_contents(tokenizer: Tokenizer) -> list[str]:
    """Returns the text of each special token."""
    return [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]


def read_as_text(tokenizer: Tokenizer, also: Iterable[str] = ()) -> None:
    """Makes the tokenizer read special tokens in text as text, and also the tokens `also`, which it
    may have as added tokens that are not special."""
    tokenizer.add_special_tokens([name for name in also if tokenizer.token_to_id(name) is not None])
    tokenizer.encode_special_tokens = True


class Typed:
    """Encodes a conversation in which special tokens of the chat template are special and those
    that the user typed are text. `quote` replaces typed special tokens by placeholders before the
    template adds its own, and `encode` reads the placeholders as text.

    Args:
        tokenizer: a tokenizer of transformers.
        end_ids: tokens that end an answer, special even if the tokenizer does not mark them.
        as_tokens: whether typed special tokens stay special; nothing is quoted then.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Iterable[int] = (),
        as_tokens: bool = False,
    ):
        self.tokenizer = tokenizer
        self.as_tokens = as_tokens
        ends = set(end_ids)
        self.tokens = {
            token.content: (index, token)
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or index in ends
        }
        # The placeholders' own characters are quoted too.
        self.quoted = [*self.tokens, TYPED, REAL, END]
        self._reader: Tokenizer | None = None

    def quote(self, text: str) -> str:
        """Returns the text with a placeholder for each special token."""
        if self.as_tokens:
            return text
        return any_of(self.quoted).sub(lambda m: f"{TYPED}{self.quoted.index(m[0])}{END}", text)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Returns the token ids of a text with placeholders. Raises a ValueError if the text has
        placeholders, but the tokenizer has no tokenizer.json."""
        if TYPED not in text or self.as_tokens:
            return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        reader, contents = self._text_reader(), list(self.tokens)
        text = any_of(contents).sub(lambda m: f"{REAL}{contents.index(m[0])}{END}", text)
        for place, content in enumerate(self.quoted):
            text = text.replace(f"{TYPED}{place}{END}", content)
        ids = reader.encode(text, add_special_tokens=add_special_tokens).ids
        return [self._real_ids.get(index, index) for index in ids]

    def _text_reader(self) -> Tokenizer:
        """Returns a copy of the tokenizer that reads special tokens as text. The template's special
        tokens have stand-ins: added tokens that split the text around them in the same way."""
        if self._reader is None:
            own = getattr(self.tokenizer, "backend_tokenizer", None)
            if not isinstance(own, Tokenizer):
                raise ValueError(
                    "found a special token, which a tokenizer without tokenizer.json cannot read "
                    "as text; --special-tokens reads it as what it is"
                )
            reader = copy.deepcopy(own)
            reader.no_truncation()
            reader.no_padding()
            read_as_text(reader, self.tokens)
            stand_ins = [
                AddedToken(
                    f"{REAL}{place}{END}",
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                    normalized=False,
                )
                for place, (_, token) in enumerate(self.tokens.values())
            ]
            reader.add_tokens(stand_ins)
            self._real_ids = {
                reader.token_to_id(stand_in.content): index
                for stand_in, (index, _) in zip(stand_ins, self.tokens.values(), strict=True)
            }
            self._reader = reader
        return self._reader
