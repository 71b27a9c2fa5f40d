"""Index maps (`PREFIX_*_indexmap_*.npy`), which say which documents make which sample and in which
order, where samples end that are padded, and how the batches of a part are read.

GPT-NeoX builds them once and finds them again by a name that holds lengths and the seed, but not
the documents' sizes or their range. After other text was prepared to the same prefix, or `split`
was changed, it reads the maps of the earlier data. Here the names also hold a hash of everything
that the maps were built from.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from megatron_patch.architecture import SettingsError, refuse
from megatron_patch.neox.patching import in_metala_runs, repairs, swapped


# megatron/data/gpt2_dataset.py:229, megatron/data/pairwise_dataset.py
@repairs("index maps", "megatron.data.gpt2_dataset:_build_index_mappings", '_filename += "_{}pi"')
def name_index_maps_after_data() -> None:
    """Makes runs with MetaLA layers build and find the index maps of their own data."""
    from megatron import training  # noqa: F401  (holds the function)
    from megatron.data import data_utils, gpt2_dataset, pairwise_dataset

    @in_metala_runs(data_utils.build_train_valid_test_data_loaders)
    def build_loaders_of_own_data(build_loaders, neox_args):
        with ExitStack() as stack:
            for module in (gpt2_dataset, pairwise_dataset):
                build = of_own_data(module._build_index_mappings)
                stack.enter_context(swapped(module, "_build_index_mappings", build))
            loaders = build_loaders(neox_args)
        for loader in filter(None, loaders.values()):
            # A loader of PyTorch draws a seed from its generator each time it starts. Only the
            # first tensor-parallel rank has a loader, so the generator that all ranks share would
            # get out of step.
            loader.generator = torch.Generator()
        return loaders


def of_own_data(build: Callable) -> Callable:
    """Wraps GPT-NeoX's `_build_index_mappings` so that file names hold a hash of its arguments.

    All ranks hash the same arguments and agree on the name. GPT-NeoX still decides which of them
    builds, and how the others wait.
    """
    signature = inspect.signature(build)

    @functools.wraps(build)
    def build_of_own_data(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        values = call.arguments
        prefix = "data_prefix" if "data_prefix" in values else "pos_data_prefix"
        path = values[prefix]
        if values["packing_impl"] == "unpacked":
            _check_some_fit(values, path)
        values[prefix] = f"{path}_{_fingerprint(values)}"
        if values["packing_impl"] != "pack_until_overflow":
            return build(*call.args, **call.kwargs)
        # This packing counts documents from the data set's first one, so validation would read the
        # documents of the training, and it runs past its list where the last document is left out.
        # It gets the sizes of those documents alone that it may use. Its last sample ends one
        # document too far; the entry appended to `doc_idx` stands for that document.
        documents = _usable(**{**values, "data_prefix": path})
        values["sizes"] = values["sizes"][documents]
        values["documents"] = np.arange(len(documents), dtype=np.int32)
        values["label_dataset"], values["allow_chopped"] = None, True
        doc_idx, sample_idx, shuffle_idx = build(*call.args, **call.kwargs)
        return documents[np.append(doc_idx, doc_idx[:1])], sample_idx, shuffle_idx

    return build_of_own_data


def _check_some_fit(values: dict[str, Any], path: str) -> None:
    """Checks that GPT-NeoX's search for documents, one a sample, finds one: it would look for ever.
    Raises a SettingsError. In pairs both documents of one must do."""
    signs = ("pos_", "neg_") if "pos_sizes" in values else ("",)
    rows = values["seq_length"]
    for i in range(len(values["documents"])):
        fits = values["allow_chopped"] or all(values[f"{s}sizes"][i] <= rows + 1 for s in signs)
        labels = (values[f"{s}label_dataset"].get(i)[:rows] for s in signs)
        if fits and all(np.any(found != -100) for found in labels):
            return
    raise _no_document(path)


def _no_document(path: str) -> SettingsError:
    return SettingsError(f"{path}: found no document that has labels and fits a sample")


def _usable(documents, sizes, label_dataset, seq_length, allow_chopped, data_prefix, **_):
    """Returns the numbers of the documents that have a label and, unless they may be chopped, fit
    into a sample. Raises a SettingsError if there is none."""
    rows = seq_length + 1
    usable = documents if allow_chopped else documents[sizes[documents] <= rows]
    if label_dataset is not None:
        usable = [i for i in usable if np.any(label_dataset.get(i)[:rows] != -100)]
    if len(usable) == 0:
        raise _no_document(data_prefix)
    return np.asarray(usable, dtype=np.int32)


def _fingerprint(values: dict[str, Any]) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for name, value in values.items():
        if name in ("name", "data_prefix", "pos_data_prefix", "use_shared_fs"):
            continue  # they say where the maps are, not what they hold
        hashed.update(f"{name}:".encode())
        if isinstance(value, np.ndarray):  # sizes [documents of the data set], documents [n]
            hashed.update(np.ascontiguousarray(value).data)
        elif hasattr(value, "sizes"):  # labels: documents with labels of -100 alone are left out
            hashed.update(_file_state(value).encode())
        else:
            hashed.update(repr(value).encode())
    return hashed.hexdigest()


def _file_state(dataset) -> str:
    """Returns size and time of the tokens' file, which is too long to be read through."""
    path = getattr(dataset, "_path", None) or dataset.path
    status = os.stat(f"{path}.bin")
    return f"{status.st_size} {status.st_mtime_ns}"


# megatron/data/gpt2_dataset.py:165, megatron/data/pairwise_dataset.py:143
@repairs(
    "padded samples", "megatron.data.gpt2_dataset:GPT2Dataset.__getitem__", "length=offset_l + 1"
)
def end_samples_with_their_documents() -> None:
    """Ends samples that are padded with their own documents, in runs with MetaLA layers.

    GPT-NeoX appends the first token of the document that happens to follow, with its label. It
    pads with token 0, which may be the end-of-document token; each would be a document of its own
    under `metala: {reset_at_document: true}`.
    """
    from megatron import training  # noqa: F401  (holds the function)
    from megatron.data import data_utils
    from megatron.data.gpt2_dataset import GPT2Dataset
    from megatron.data.pairwise_dataset import PairwiseDataset

    @in_metala_runs(data_utils.build_train_valid_test_data_loaders)
    def build_loaders_of_whole_samples(build_loaders, neox_args):
        eod = neox_args.tokenizer.eod
        if neox_args.pack_impl != "packed":
            if neox_args.train_impl == "normal" and not neox_args.train_label_data_paths and eod:
                raise SettingsError(
                    "train_label_data_paths: found none, wanted labels: the end-of-document token "
                    f"is {eod}, so padding, which is 0, would count in the loss"
                )
            for dataset in (GPT2Dataset, PairwiseDataset):
                _end_with_documents(dataset, padding=int(eod == 0))
        return build_loaders(neox_args)


def _end_with_documents(dataset: type, padding: int) -> None:
    """Lets samples of a data set that have labels end with their documents."""
    get = inspect.unwrap(dataset.__getitem__)

    @functools.wraps(get)
    def get_padded(self, index: int) -> dict[str, np.ndarray]:
        sample = get(self, index)
        try:
            place = self.shuffle_idx[index]
            first, end = self.sample_idx[place][0], self.sample_idx[place + 1][0]
        except IndexError:  # GPT-NeoX has taken another index instead
            return sample
        for sign, tokens in (("pos_", "pos"), ("neg_", "neg"), ("", "text")):
            if f"{sign}label" in sample:
                sizes = getattr(self, f"{sign}indexed_dataset").sizes
                length = sizes[self.doc_idx[first:end]].sum()
                sample[tokens][length:], sample[f"{sign}label"][length:] = padding, -100
        return sample

    dataset.__getitem__ = get_padded


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
    from megatron import training  # noqa: F401  (holds the function)
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
                if name in batch and (largest := int(batch[name].max())) >= vocab_size:
                    sys.exit(
                        f"MetaLA: data: found the token {largest}, wanted one below {vocab_size}, "
                        "the number of the embedding's rows: another tokenizer prepared these data"
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
    from megatron import training  # noqa: F401  (holds the function)
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


# ---- What there is to read


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
    elif not neox_args.do_valid and neox_args.rank == 0:
        line = f"split: {neox_args.split!r} leaves no document to validate on"
        print(f"MetaLA: {line}, so there is no validation", flush=True)
    for part, loader in loaders.items():
        if loader is not None and len(loader) == 0:
            samples = f"{len(loader.dataset)} samples of {neox_args.seq_length} tokens"
            raise SettingsError(
                f"{part} data: found {samples}, wanted one micro-batch for every rank at least"
            )
