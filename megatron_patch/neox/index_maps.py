"""Index maps, `PREFIX_*_indexmap_*.npy`: which documents make which sample, in which order.

GPT-NeoX builds them once, and finds them again by a name that holds lengths and the seed, but
neither the documents' sizes nor their range. After other text was prepared to the same prefix, or
`split` was changed, it reads the maps of what was there before. Here their names also hold a hash
of all that they were built from.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch


def name_index_maps_after_data(replace: Callable[[Any, Any], None]) -> None:
    """Runs with metala layers find the index maps of their own data.

    Args:
        replace: rebinds a function of GPT-NeoX in all its modules.
    """
    from megatron import training  # noqa: F401  (holds the function)
    from megatron.data import data_utils, gpt2_dataset, pairwise_dataset

    build_loaders = data_utils.build_train_valid_test_data_loaders

    @functools.wraps(build_loaders)
    def build_loaders_of_own_data(neox_args):
        if "metala" not in neox_args.attention_config:
            return build_loaders(neox_args)
        with ExitStack() as stack:
            for module in (gpt2_dataset, pairwise_dataset):
                stack.enter_context(_named_after_data(module))
            loaders = build_loaders(neox_args)
        for loader in filter(None, loaders.values()):
            # PyTorch's loader draws a seed each time it starts. Only the first tensor-parallel rank
            # has one: drawn from the generator that all ranks share, it sets that rank apart.
            loader.generator = torch.Generator()
        return loaders

    replace(build_loaders, build_loaders_of_own_data)


@contextmanager
def _named_after_data(module):
    build = module._build_index_mappings
    module._build_index_mappings = of_own_data(build)
    try:
        yield
    finally:
        module._build_index_mappings = build


def of_own_data(build: Callable) -> Callable:
    """GPT-NeoX's `_build_index_mappings`, with a hash of its arguments in the files' names.

    All ranks hash the same arguments, so they agree on the name; which of them builds, and how the
    others wait, stays GPT-NeoX's matter.
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
        # This packing counts from the data set's first document, so that the validation documents
        # would be those of the training: it gets the sizes of its own ones. And its last sample
        # ends in a document after the last, which is not there.
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
            continue  # where the maps lie, not what they hold
        hashed.update(f"{name}:".encode())
        if isinstance(value, np.ndarray):  # sizes [documents of the data set] and documents [n]
            hashed.update(np.ascontiguousarray(value).data)
        elif hasattr(value, "sizes"):  # labels; documents that have none but -100 are left out
            hashed.update(_file_state(value).encode())
        else:
            hashed.update(repr(value).encode())
    return hashed.hexdigest()


def _file_state(dataset) -> str:
    """Length and time of the tokens' file, which is too long to be read through."""
    path = getattr(dataset, "_path", None) or dataset.path
    status = os.stat(f"{path}.bin")
    return f"{status.st_size} {status.st_mtime_ns}"
