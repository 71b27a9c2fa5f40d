"""Index maps (`PREFIX_*_indexmap_*.npy`): which documents make which sample, and in which order.

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
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

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
        values[prefix] = f"{values[prefix]}_{_fingerprint(values)}"
        if values["packing_impl"] != "pack_until_overflow":
            return build(*call.args, **call.kwargs)
        # This packing counts documents from the data set's first one, so validation would read the
        # documents of the training. It gets the sizes of its own documents instead. Its last sample
        # ends one document too far; the entry appended to `doc_idx` stands for that document.
        documents, first = values["documents"], int(values["documents"][0])
        for sizes in {"sizes", "pos_sizes", "neg_sizes"} & values.keys():
            values[sizes] = values[sizes][documents]
        values["documents"] = documents - first
        doc_idx, sample_idx, shuffle_idx = build(*call.args, **call.kwargs)
        return np.append(doc_idx, doc_idx[:1]) + first, sample_idx, shuffle_idx

    return build_of_own_data


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
