"""The three ways in which the plugin changes an imported GPT-NeoX."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_patch.architecture import METALA


def replace(original: Any, replacement: Any) -> None:
    """Rebinds `original` in every GPT-NeoX module that imported it, under whatever name."""
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "megatron":
            for name, value in list(vars(module).items()):
                if value is original:
                    setattr(module, name, replacement)


def has_metala_layers(neox_args: Any) -> bool:
    """Returns whether a run has MetaLA layers, from settings that GPT-NeoX has accepted."""
    return METALA in neox_args.attention_config


def mentions_metala(neox_args: Any) -> bool:
    """Returns whether settings ask for MetaLA, before anything has checked them."""
    return neox_args.metala is not None or f"'{METALA}'" in str(neox_args.attention_config)


def in_metala_runs(original: Callable) -> Callable[[Callable], Callable]:
    """Decorates a function that replaces `original` in runs with MetaLA layers. Other runs still
    call `original`.

    The decorated function takes `original` and then its arguments, `neox_args` first.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(original)
        def call(neox_args, *args, **kwargs):
            if not has_metala_layers(neox_args):
                return original(neox_args, *args, **kwargs)
            return function(original, neox_args, *args, **kwargs)

        replace(original, call)
        return call

    return decorate


@contextmanager
def swapped(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replaces the attribute `name` of a module or class while the context is entered."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)
