"""Repairs of GPT-NeoX that take a few lines each."""

from __future__ import annotations

import inspect
import os
import sys
from types import SimpleNamespace

from megatron_patch.architecture import SettingsError, one_line
from megatron_patch.neox.patching import mentions_metala, overrides, repairs, replaces, swapped
from megatron_patch.neox.this_process import is_first_here


# megatron/data/indexed_dataset.py:71
@repairs("data_impl: infer", "megatron.data.indexed_dataset:make_dataset", 'elif impl == "cached"')
def open_inferred_data_sets() -> None:
    """Lets `data_impl: infer`, the default, open the data set whose format it has recognised."""
    from megatron.data.indexed_dataset import infer_dataset_impl, make_dataset

    @replaces(make_dataset)
    def make_inferred_dataset(make_dataset, path, impl, skip_warmup=False):
        if impl == "infer":
            impl = infer_dataset_impl(path)
        return make_dataset(path, impl, skip_warmup)


# megatron/training.py:544, unpacked in line 1611. Of the same kind as
# https://github.com/EleutherAI/gpt-neox/issues/1320
@repairs(
    "validation in a pipeline",
    "megatron.training:forward_step",
    "return model.eval_batch(data_iterator",
)
def return_metrics_in_pipelines() -> None:
    """Lets `forward_step` return a loss and metrics with `pipe_parallel_size` >= 1 too, as its
    caller `evaluate` expects."""
    from megatron.training import forward_step

    @replaces(forward_step)
    def forward_step_with_metrics(forward_step, *args, **kwargs):
        result = forward_step(*args, **kwargs)
        return result if isinstance(result, tuple) else (result, {})


# megatron/utils.py:144, megatron/neox_arguments/arguments.py:453
@repairs("wandb offline", "megatron.utils:get_wandb_api_key", 'if "WANDB_LOCAL" in os.environ')
def log_to_wandb_offline() -> None:
    """Keeps wandb on without an API key under WANDB_MODE=offline, and gives back to `wandb.util`
    the function that GPT-NeoX calls there."""
    from megatron.utils import get_wandb_api_key

    wandb = sys.modules.get("wandb")  # GPT-NeoX has imported it where it is installed
    util = getattr(wandb, "util", None)  # another module named wandb has none
    if util is not None and not hasattr(util, "generate_id"):
        util.generate_id = wandb.sdk.lib.runid.generate_id

    @replaces(get_wandb_api_key)
    def key_unless_offline(get_wandb_api_key, neox_args):
        if os.environ.get("WANDB_MODE") == "offline":
            return "LOCAL"  # GPT-NeoX's own answer for a local wandb server
        return get_wandb_api_key(neox_args)


# megatron/tokenizer/tokenizer.py:160
@repairs(
    "GPT2BPETokenizer", "megatron.tokenizer.tokenizer:_GPT2BPETokenizer.__init__", "GPT2Tokenizer("
)
def repair_gpt2_tokenizer() -> None:
    """Lets `GPT2BPETokenizer` read its two files under transformers 5.

    GPT-NeoX builds transformers' `GPT2Tokenizer` from file names and reads its `encoder` and
    `decoder`. Since transformers 5 that class takes no file names and has neither attribute.
    Nothing changes where it still takes a `vocab_file`.
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


# megatron/tokenizer/tokenizer.py:233
@repairs(
    "unreadable tokenizers",
    "megatron.tokenizer.tokenizer:HFTokenizer.__init__",
    "Tokenizer.from_file(vocab_file)",
)
def name_the_tokenizers_file() -> None:
    """Ends a rank with one line if its tokenizer cannot be read. The errors of the package
    `tokenizers` name no file."""
    from megatron.neox_arguments import NeoXArgs

    @overrides(NeoXArgs, "build_tokenizer")
    def build_or_end(build_tokenizer, self) -> None:
        try:
            build_tokenizer(self)
        except Exception as error:
            if not mentions_metala(self):
                raise
            line = f"vocab_file: {self.tokenizer_type} cannot read {self.vocab_file}: {error}"
            sys.exit(f"MetaLA: {one_line(line)}" if is_first_here() else 1)


# megatron/logging.py:35
@repairs("log_dir", "megatron.logging:Tee.__init__", 'open(file, "w")')
def append_to_logs() -> None:
    """Appends to the files in `log_dir`. GPT-NeoX opens them anew in the launcher, in every rank of
    a host and at every start, so that each writes over what the others have written."""
    from megatron.logging import Tee
    from megatron.neox_arguments import NeoXArgs, arguments

    class AppendingTee(Tee):
        def __init__(self, file: str, err: bool = False):
            super().__init__(os.devnull, err)
            self.file.close()
            self.file = open(file, "a", buffering=1, encoding="utf-8")

    @overrides(NeoXArgs, "enable_logging")
    def enable_appending(enable_logging, self) -> None:
        is_metala = mentions_metala(self)
        try:
            with swapped(arguments, "Tee", AppendingTee if is_metala else Tee):
                enable_logging(self)
        except OSError as error:
            if not is_metala:
                raise
            wanted = f"a folder that can be written to: {error.strerror}"
            raise SettingsError(f"log_dir: found {self.log_dir}, wanted {wanted}") from None
