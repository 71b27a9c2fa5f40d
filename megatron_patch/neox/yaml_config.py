"""The reader of GPT-NeoX's settings in several YAML files, with or without GPT-NeoX.

Where files give a key more than once, the last value stands, and a line says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_patch.architecture import SettingsError
from megatron_patch.files import read_text

# GPT-NeoX reads JSON as YAML too.
SUFFIXES = (".yml", ".yaml", ".json")
MAX_BYTES = 2**20
MAX_VALUES = 100_000  # aliases included: they can repeat values beyond any memory
MAX_DIGITS = 40


def merge_yaml(paths: Iterable[str | Path]) -> dict[str, Any]:
    """Returns the settings of all files as one mapping, with '_' for each '-' in a key.

    Like on GPT-NeoX's command line, a file name may leave out `.yml`. Raises a SettingsError if a
    file cannot be read, is not YAML or not a mapping. The line names the file.
    """
    return merge_yaml_texts(read_yaml(paths))


def read_yaml(paths: Iterable[str | Path]) -> dict[str, str]:
    """Returns the text of each file by its name, to which `.yml` is added if it has no suffix.
    Raises a SettingsError if a file cannot be read or is given twice."""
    texts: dict[str, str] = {}
    for path in paths:
        name = str(path) if str(path).endswith(SUFFIXES) else f"{path}.yml"
        if name in texts:
            raise SettingsError(f"{name}: the file is given twice")
        try:
            texts[name] = read_text(Path(name), max_bytes=MAX_BYTES)
        except OSError as error:
            raise SettingsError(f"{name}: cannot be read: {error.strerror}") from None
    return texts


def merge_yaml_texts(texts: Mapping[str, str], in_order: bool = True) -> dict[str, Any]:
    """Does the same as :func:`merge_yaml` for texts by file name. The files in a checkpoint have no
    order (`in_order` false), so two of them must not give a key different values."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, text in texts.items():
        for key, value in _top_level_items(name, text):
            if key in merged and merged[key] != value:
                if not in_order and origin[key] != name:
                    raise SettingsError(
                        f"{name}: {key}: found {value!r}, and {merged[key]!r} in {origin[key]}, "
                        "wanted one value"
                    )
                print(
                    f"MetaLA: {key}: {value!r} of {name} stands, not {merged[key]!r} of "
                    f"{origin[key]}",
                    file=sys.stderr,
                )
            merged[key], origin[key] = value, name
    return merged


def settle(texts: Mapping[str, str]) -> dict[str, str]:
    """Removes each setting from all files but the one whose value stands, so that the order of the
    files, which a folder does not keep, no longer matters. A file that loses a key also loses its
    comments."""
    items = {name: _top_level_items(name, text) for name, text in texts.items()}
    last = {key: name for name, pairs in items.items() for key, _ in pairs}
    settled = {}
    for name, pairs in items.items():
        kept = {key: value for key, value in pairs if last[key] == name}
        is_whole = len(kept) == len(pairs)
        settled[name] = texts[name] if is_whole else yaml.safe_dump(kept, sort_keys=False)
    return settled


def _top_level_items(name: str, text: str) -> list[tuple[str, Any]]:
    """Returns (key, value) in file order, with '_' for each '-' in a key. It keeps both of two
    equal keys, of which PyYAML would drop one without a word."""
    if len(text) > MAX_BYTES:
        raise SettingsError(f"{name}: found {len(text):,} characters, wanted at most {MAX_BYTES:,}")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise SettingsError(f"{name}: found a {node.id}, wanted a mapping of settings")
        _count_values(name, node, {})
        loader.flatten_mapping(node)
        return [
            (
                str(loader.construct_object(key, deep=True)).replace("-", "_"),
                loader.construct_object(value, deep=True),
            )
            for key, value in node.value
        ]
    except SettingsError:
        raise
    except RecursionError:
        raise SettingsError(f"{name}: not YAML: nested too deeply") from None
    except Exception as error:  # PyYAML passes on what Python raises for bad dates and numbers
        reason = " ".join(str(error).split())
        raise SettingsError(f"{name}: not YAML: {reason}") from None


def _count_values(name: str, node: yaml.Node, counted: dict[int, int | None]) -> int:
    """Counts the values in a node; a value that aliases repeat counts each time. Raises a
    SettingsError if there are too many values, a value holds itself, or a number is too long."""
    if id(node) in counted:
        if counted[id(node)] is None:
            raise SettingsError(f"{name}: not YAML of settings: a value holds itself")
        return counted[id(node)]
    counted[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
            raise SettingsError(f"{name}: found a number of {len(node.value)} digits")
        total = 1
    else:
        is_mapping = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if is_mapping else node.value
        total = 1 + sum(_count_values(name, part, counted) for part in parts)
    if total > MAX_VALUES:
        raise SettingsError(f"{name}: found more than {MAX_VALUES:,} values, aliases included")
    counted[id(node)] = total
    return total
