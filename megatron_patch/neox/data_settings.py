"""Checks of the paths and weights of data, and of all other paths, in a run with MetaLA layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from megatron_patch.architecture import refuse

_PATH = re.compile(r"(_path|_paths|_dir|_file|_prefix)$|^(save|load|hostfile)$")
_EXPANDED = "fused_kernels_build_path"  # the one path in which GPT-NeoX replaces ~
_OF_THE_SHELL = re.compile(r"^~|\$\{?\w")


def check_paths(settings: Mapping[str, Any]) -> None:
    """Refuses `~` and `$NAME` in paths. A shell replaces them. GPT-NeoX does not, and would save
    into a folder of that name below the current one."""
    for name, value in settings.items():
        if not _PATH.search(name) or name == _EXPANDED:
            continue
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and _OF_THE_SHELL.search(path):
                wanted = "a path in full: GPT-NeoX takes ~ and $ for characters of a name"
                refuse(name, path, wanted)


def check_data(args: Any) -> None:
    """Checks that a training has data, and how one data set is split."""
    if args.data_impl is None:
        refuse("data_impl", None, "infer, mmap or cached")
    if args.data_path:
        split_weights(args.split)
    elif not (args.train_data_paths or args.pos_train_data_paths):
        wanted = "a data set to train on, or train_data_paths beside valid_ and test_data_paths"
        refuse("data_path", args.data_path, wanted)


def split_weights(split: Any) -> list[float]:
    """Returns the shares of training, validation and test documents that GPT-NeoX's `split` gives,
    of any positive sum. GPT-NeoX takes shares below 0 too. Raises a SettingsError if it is no text
    of up to three numbers from 0 on."""
    try:
        weights = [float(part) for part in split.split("," if "," in split else "/")][:3]
    except (AttributeError, ValueError):
        weights = []
    if not weights or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        refuse("split", split, "three numbers of at least 0, e.g. 969,30,1")
    return weights + [0.0] * (3 - len(weights))


def check_data_weights(args: Any) -> None:
    """Refuses weights of data sets that GPT-NeoX would ignore, would use although they are below 0,
    or would meet with an assertion that has no message."""
    if args.weight_by_num_documents:
        # megatron/data/data_utils.py:409 multiplies |L|^alpha, which the settings promise, by
        # 1 - |L| / all: with alpha 1, two data sets of 90 and 10 documents weigh the same.
        wanted = "false, and train_data_weights: GPT-NeoX computes other weights than it says"
        refuse("weight_by_num_documents", True, wanted)
    for part in ("train", "valid", "test"):
        name = f"{part}_data_weights"
        if (weights := getattr(args, name)) is None:
            continue
        paths = getattr(args, f"{part}_data_paths") or getattr(args, f"pos_{part}_data_paths")
        if not paths:
            refuse(name, weights, f"none without {part}_data_paths")
        if len(weights) != len(paths):
            refuse(name, weights, f"{len(paths)} weights, one for each of {part}_data_paths")
        if args.train_epochs and len(set(weights)) > 1:
            refuse(name, weights, "none with train_epochs, which reads each sample once an epoch")
        if min(weights) < 0 or sum(weights) <= 0:
            refuse(name, weights, "weights of at least 0, and one above it")
