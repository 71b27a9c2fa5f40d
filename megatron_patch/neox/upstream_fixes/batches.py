"""How the batches of training, validation and test data are read."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_patch.architecture import SettingsError, refuse
from megatron_patch.neox.notices import say
from megatron_patch.neox.patching import in_metala_runs, repairs, swapped


# megatron/data/data_utils.py:784
@repairs(
    "batches read once more",
    "megatron.data.data_utils:shift_and_wrap_data_loaders",
    "cycle(train_dataloader)",
)
def read_batches_again() -> None:
    """Reads a part from its beginning when it ends, and keeps no batch.

    GPT-NeoX takes `itertools.cycle`, which keeps every batch for a second pass: 8 bytes of the
    host's memory for each token that a rank has ever read. After a resumed run's first pass, it
    would go on with the batches behind the place where that run began, and with no other. It also
    miscounts the batches that earlier validations have read, if a run with gradient accumulation
    stops between two of them.
    """
    from megatron.data import data_utils

    @in_metala_runs(data_utils.shift_and_wrap_data_loaders)
    def wrap_without_keeping(wrap, neox_args, data_loaders, *args, **kwargs):
        read = functools.partial(endless, vocab_size=neox_args.padded_vocab_size)
        with swapped(data_utils, "cycle", read):
            iterators = wrap(neox_args, data_loaders, *args, **kwargs)
        if valid := data_loaders["valid"]:  # the first batch has not been read yet
            done = neox_args.iteration // neox_args.eval_interval * neox_args.eval_iters
            start = done * neox_args.gradient_accumulation_steps
            valid.batch_sampler.start_iter = start % len(valid)
        return iterators


def endless(loader: Any, vocab_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the batches of a loader again and again. Ends the rank if one has a token that is none
    of the vocabulary: tensor-parallel ranks would take it for a vector of zeros, and train."""
    while True:
        for batch in loader:
            for name in ("text", "pos", "neg"):
                for found in map(int, batch[name].aminmax() if name in batch else ()):
                    if found >= vocab_size:
                        sys.exit(
                            f"MetaLA: data: found the token {found}, wanted one below {vocab_size},"
                            " the number of the embedding's rows: another tokenizer prepared these "
                            "data"
                        )
                    if found < 0:
                        sys.exit(
                            f"MetaLA: data: found {found}, wanted tokens: these may be labels, "
                            "which have their own setting"
                        )
            yield batch


# megatron/data/blendable_dataset.py:30
@repairs(
    "epochs of several data sets",
    "megatron.data.data_utils:build_train_valid_test_data_loaders",
    "BlendableDataset(train_datasets, train_weights)",
)
def blend_whole_data_sets() -> None:
    """Reads each sample of each data set once in an epoch, with `train_epochs`.

    GPT-NeoX draws as many samples from each data set: of 600 and 46 samples 323 each, so that it
    reads one in part and the other seven times.
    """
    from megatron.data import data_utils

    blend = data_utils.BlendableDataset

    def blend_all(datasets: list, weights: list[float]):
        sizes = [len(dataset) for dataset in datasets]
        blended = blend(datasets, sizes)
        # Sample j of n stands at (j + 1/2) / n of the epoch.
        places = np.concatenate([(np.arange(n) + 0.5) / n for n in sizes])
        order = np.argsort(places, kind="stable")
        blended.dataset_index = np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)[order]
        blended.dataset_sample_index = np.concatenate([np.arange(n) for n in sizes])[order]
        return blended

    @in_metala_runs(data_utils.build_train_valid_test_data_loaders)
    def build_loaders_of_epochs(build_loaders, neox_args):
        with swapped(
            data_utils, "BlendableDataset", blend_all if neox_args.train_epochs else blend
        ):
            return build_loaders(neox_args)


def check_parts(neox_args: Any, loaders: dict[str, Any]) -> None:
    """Checks the loaders that GPT-NeoX has built, `None` for parts that this rank does not read.

    Takes the parts for validation and test away if `eval_iters` is 0, which GPT-NeoX overlooks with
    `train_epochs`, and prints a line if there is no document to validate on. Raises a SettingsError
    if there is nothing to train on, a part has less than a batch, or the loss leaves out a token
    that the tokenizer does not have.
    """
    if not neox_args.do_train:
        refuse("split", neox_args.split, "a share of documents to train on")
    if neox_args.eod_mask_loss and neox_args.tokenizer.eod is None:
        raise SettingsError(
            "eod_mask_loss: found true with a tokenizer that has no end-of-document token, wanted "
            "one with <|endoftext|>"
        )
    if not neox_args.eval_iters:
        neox_args.do_valid = neox_args.do_test = 0
        loaders["valid"] = loaders["test"] = None
    elif not neox_args.do_valid:
        say(f"split: {neox_args.split!r} leaves no document to validate on: no validation")
    for part, loader in loaders.items():
        if loader is not None and len(loader) == 0:
            samples = f"{len(loader.dataset)} samples of {neox_args.seq_length} tokens"
            raise SettingsError(
                f"{part} data: found {samples}, wanted one micro-batch for every rank at least"
            )
