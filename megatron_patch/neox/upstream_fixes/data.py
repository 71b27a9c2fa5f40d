"""The files of data sets: their faults, their index maps, and the ends of padded samples.

Index maps (`PREFIX_*_indexmap_*.npy`) say which documents make which sample, and in which order.
GPT-NeoX builds them once and finds them again by a name that holds lengths and the seed, but not
the documents' sizes or their range. After other text was prepared to the same prefix, or `split`
was changed, it reads the maps of the earlier data. Here the names also hold a hash of everything
that the maps were built from. A killed run leaves none that is half-written.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_patch.architecture import SettingsError
from megatron_patch.indexed_dataset import IndexedDataset, idx_path
from megatron_patch.neox.patching import in_metala_runs, overrides, repairs, swapped
from megatron_patch.neox.this_process import is_first_here
from megatron_patch.neox.upstream_fixes.saving import end_all_if

_OLD_FORMAT = b"TNTIDX"  # GPT-NeoX's `data_impl: cached`


# megatron/data/indexed_dataset.py:57
@repairs("data files", "megatron.data.indexed_dataset:make_dataset", "return None")
def name_files_that_cannot_be_read() -> None:
    """Ends the run with one line if a file of a data set is missing or damaged on some host, where
    GPT-NeoX ends in an AttributeError that names none."""
    from megatron.data import data_utils

    @in_metala_runs(data_utils.build_train_valid_test_data_loaders)
    def build_loaders_of_files(build_loaders, neox_args):
        end_all_if(_wrong_file(vars(neox_args)) if is_first_here() else None)
        return build_loaders(neox_args)


def _wrong_file(settings: dict[str, Any]) -> str | None:
    """Returns what is wrong with the first data set that cannot be read, or has other documents
    than those it belongs to."""
    opened: dict[tuple[str, int], IndexedDataset] = {}
    for name, value in settings.items():
        if not value or not (name == "data_path" or name.endswith("_data_paths")):
            continue
        for number, prefix in enumerate([value] if name == "data_path" else value):
            try:
                if not _is_of_old_format(prefix):
                    opened[name, number] = IndexedDataset(prefix)
            except (OSError, ValueError) as error:
                return f"{name}: {error}"
    for (name, number), found in opened.items():
        for of, has_tokens in ((name.replace("_label", ""), True), (_whose(name), False)):
            wanted = opened.get((of, number))
            if wanted is not None and (reason := _differs(found, wanted, has_tokens)):
                return f"{name}: {found.prefix}: found {reason} of {wanted.prefix}"
    return None


def _whose(name: str) -> str:
    """Returns the setting of the data set that must have as many documents: for rewards that of the
    samples, for the worse answers that of the better ones."""
    return name.replace("_reward", "").replace("neg_", "pos_")


def _differs(found: IndexedDataset, wanted: IndexedDataset, has_tokens: bool) -> str | None:
    """Returns how documents differ, in number or, if both have as many tokens, in length."""
    if len(found) != len(wanted):
        return f"{len(found)} documents, wanted as many as the {len(wanted)}"
    if has_tokens and (other := found.sizes != wanted.sizes).any():
        first = int(other.argmax())
        return (
            f"{found.sizes[first]} labels in document {first}, wanted as many as the "
            f"{wanted.sizes[first]} tokens"
        )
    return None


def _is_of_old_format(prefix: str) -> bool:
    path = idx_path(prefix)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_OLD_FORMAT)) == _OLD_FORMAT


# megatron/data/gpt2_dataset.py:229, megatron/data/pairwise_dataset.py
@repairs("index maps", "megatron.data.gpt2_dataset:_build_index_mappings", '_filename += "_{}pi"')
def name_index_maps_after_data() -> None:
    """Makes runs with MetaLA layers build and find the index maps of their own data."""
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

    def build_whole(call: inspect.BoundArguments) -> tuple[np.ndarray, ...]:
        with swapped(np, "save", _save_whole):
            return build(*call.args, **call.kwargs)

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
            return build_whole(call)
        # This packing counts documents from the data set's first one, so validation would read the
        # documents of the training, and it runs past its list where the last document is left out.
        # It gets the sizes of those documents alone that it may use. Its last sample ends one
        # document too far; the entry appended to `doc_idx` stands for that document.
        documents = _usable(**{**values, "data_prefix": path})
        values["sizes"] = values["sizes"][documents]
        values["documents"] = np.arange(len(documents), dtype=np.int32)
        values["label_dataset"], values["allow_chopped"] = None, True
        doc_idx, sample_idx, shuffle_idx = build_whole(call)
        return documents[np.append(doc_idx, doc_idx[:1])], sample_idx, shuffle_idx

    return build_of_own_data


_save = np.save


def _save_whole(path: str, array: np.ndarray, **options: Any) -> None:
    """Saves an array like `np.save`. The file appears when it is whole: a later run, or one that
    starts at the same time, takes every file that it finds. Ends the rank, which is the first of
    its host and says why, if the file cannot be written."""
    temporary = Path(f"{path}.{os.uname().nodename}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            _save(file, array, **options)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        sys.exit(
            f"MetaLA: data: {path}, an index map, cannot be written: {error.strerror}; wanted data "
            "in a folder that this run may write to, such as one with links to their files"
        )


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
    from megatron.data import data_utils
    from megatron.data.gpt2_dataset import GPT2Dataset
    from megatron.data.pairwise_dataset import PairwiseDataset

    @in_metala_runs(data_utils.build_train_valid_test_data_loaders)
    def build_loaders_of_whole_samples(build_loaders, neox_args):
        eod, is_padded = neox_args.tokenizer.eod, neox_args.pack_impl != "packed"
        has_labels = neox_args.train_impl != "normal" or neox_args.train_label_data_paths
        if is_padded and eod and not has_labels:
            raise SettingsError(
                "train_label_data_paths: found none, wanted labels: the end-of-document token "
                f"is {eod}, so padding, which is 0, would count in the loss"
            )
        loaders = build_loaders(neox_args)
        for loader in filter(None, loaders.values()) if is_padded else ():
            for dataset in getattr(loader.dataset, "datasets", [loader.dataset]):
                dataset.padding = int(eod == 0)
        return loaders

    for dataset in (GPT2Dataset, PairwiseDataset):
        overrides(dataset, "__getitem__")(_get_padded)


def _get_padded(get: Callable, dataset: Any, index: int) -> dict[str, np.ndarray]:
    """Returns a sample; one with labels ends with its documents if the data set is padded."""
    sample = get(dataset, index)
    if not hasattr(dataset, "padding"):
        return sample
    try:
        place = dataset.shuffle_idx[index]
        first, end = dataset.sample_idx[place][0], dataset.sample_idx[place + 1][0]
    except IndexError:  # GPT-NeoX has taken another index instead
        return sample
    for sign, tokens in (("pos_", "pos"), ("neg_", "neg"), ("", "text")):
        if f"{sign}label" in sample:
            sizes = getattr(dataset, f"{sign}indexed_dataset").sizes
            length = sizes[dataset.doc_idx[first:end]].sum()
            sample[tokens][length:], sample[f"{sign}label"][length:] = dataset.padding, -100
    return sample
