"""GPT-NeoX's `GPT2BPETokenizer`, the one of its own configurations, under transformers 5."""

from __future__ import annotations

import inspect
from types import SimpleNamespace


def repair_gpt2_tokenizer() -> None:
    """Lets `GPT2BPETokenizer` read its two files.

    It builds transformers' `GPT2Tokenizer` by file names and reads `encoder` and `decoder`. From
    transformers 5 on that takes no file names and has neither: AttributeError. Left alone where the
    class still takes a `vocab_file`.
    """
    from megatron.tokenizer.tokenizer import AbstractTokenizer, _GPT2BPETokenizer
    from transformers import GPT2Tokenizer

    if "vocab_file" in inspect.signature(GPT2Tokenizer.__init__).parameters:
        return

    def read_files(self, vocab_file: str, merge_file: str) -> None:
        from tokenizers.models import BPE

        AbstractTokenizer.__init__(self, "GPT2 BPE")
        vocab, merges = BPE.read_file(vocab_file, merge_file)
        tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges)
        self.tokenizer = SimpleNamespace(
            encoder=vocab,
            decoder={number: token for token, number in vocab.items()},
            encode=tokenizer.encode,
            decode=tokenizer.decode,
        )
        self.eod_id = vocab["<|endoftext|>"]

    _GPT2BPETokenizer.__init__ = read_files
