"""A long text that is cut keeps its tokens; where that is not sure, it is not cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from megatron_patch.commands.documents import Document
from megatron_patch.commands.text_pieces import pieces, safe_cut

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Whitespace and its look-alikes, letters that normal forms decompose, and what joins lines.
ALPHABET = " \n\t\r'sé1a.,中\u00a0\u3000\u0301\x1cガ▁/\u00a8\u200b"
TEXTS = [
    ALPHABET * 3,
    "a a a a  a  \n a\n. \n .\n\n.\n. . .  . " * 30,
    " a s 's 's a's a.\n a.\n/ 中\n中 中\n ▁ ▁▁ ▁ é é é. " * 30,
]


def split(pattern: str) -> pre.Sequence:
    return pre.Sequence(
        [pre.Split(Regex(pattern), "isolated"), pre.ByteLevel(False, use_regex=False)]
    )


def build(pre_tokenizer, normalizer=None, *added) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["  ", "    ", *added])
    return tokenizer


CUTTING = [
    build(pre_tokenizer, normalizer)
    for pre_tokenizer in (
        pre.ByteLevel(add_prefix_space=False),
        pre.ByteLevel(add_prefix_space=True),
        pre.Whitespace(),
        pre.WhitespaceSplit(),
        split(GPT4),
        split(GPT4.replace("{1,3}", "")),
        pre.Sequence([pre.Digits(True), pre.ByteLevel(add_prefix_space=True)]),
        pre.Metaspace(prepend_scheme="always"),
        pre.Metaspace(prepend_scheme="first"),
        pre.Metaspace(prepend_scheme="never"),
    )
    for normalizer in (None, normalizers.NFC(), normalizers.NFKD())
]


@settings(max_examples=600, deadline=None)
@given(
    tokenizer=st.sampled_from(CUTTING),
    text=st.text(st.sampled_from(ALPHABET), min_size=1, max_size=40),
    size=st.integers(1, 8),
)
def test_pieces_have_the_tokens_of_the_whole(tokenizer, text, size):
    parts = list(pieces(Document(text, "x"), safe_cut(tokenizer, False), size))
    assert [is_last for _, is_last in parts] == [False] * (len(parts) - 1) + [True]
    found = [piece for piece, _ in parts]
    assert "".join(found) == text
    ids = [i for piece in found for i in tokenizer.encode(piece, add_special_tokens=False).ids]
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids, found


@pytest.mark.parametrize("tokenizer", CUTTING[::3])
def test_a_long_text_is_cut(tokenizer):
    parts = pieces(Document("some words " * 100, "x"), safe_cut(tokenizer, False), 50)
    found = [piece for piece, _ in parts]
    assert len(found) > 15 and max(map(len, found)) < 60


@pytest.mark.parametrize(
    "tokenizer",
    [
        build(pre.ByteLevel(), normalizers.Prepend("▁")),
        build(pre.ByteLevel(use_regex=False)),
        build(pre.Metaspace(split=False)),
        build(split(r"[a-z ]+|\s+")),
        build(pre.Split(" ", "removed")),
        build(pre.ByteLevel(), None, "new york"),
        build(pre.ByteLevel(), None, AddedToken("<x>", rstrip=True)),
    ],
)
def test_where_a_cut_is_not_sure_a_text_stays_whole(tokenizer):
    cut = safe_cut(tokenizer, False)
    assert cut is None
    document = Document("some words " * 100, "file:3")
    assert list(pieces(document, cut, 50, longest=1100)) == [(document.text, True)]
    with pytest.raises(ValueError, match=r"^file:3: found 1,100 char.* wanted at most 1,000"):
        list(pieces(document, cut, 50, longest=1000))


def test_special_tokens_count_where_they_are_read():
    tokenizer = build(pre.ByteLevel())
    tokenizer.add_special_tokens(["<end of text>"])
    assert safe_cut(tokenizer, special_tokens=False)
    assert safe_cut(tokenizer, special_tokens=True) is None
