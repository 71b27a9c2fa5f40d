"""How the plugin changes an imported GPT-NeoX, and how it marks a repair of a fault upstream."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from megatron_patch.architecture import METALA


def has_metala_layers(neox_args: Any) -> bool:
    """Returns whether a run has MetaLA layers, from settings that GPT-NeoX has accepted."""
    return METALA in neox_args.attention_config


def mentions_metala(neox_args: Any) -> bool:
    """Returns whether settings ask for MetaLA, before anything has checked them."""
    return neox_args.metala is not None or f"'{METALA}'" in str(neox_args.attention_config)


def replaces(original: Callable) -> Callable[[Callable], Callable]:
    """Decorates a function that takes the place of a function of GPT-NeoX's, in every module that
    imported it, under whatever name. It takes `original` and then the arguments of a call."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(original)
        def call(*args, **kwargs):
            return function(original, *args, **kwargs)

        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] == "megatron":
                for name, value in list(vars(module).items()):
                    if value is original:
                        setattr(module, name, call)
        return function

    return decorate


def in_metala_runs(original: Callable) -> Callable[[Callable], Callable]:
    """Does what `replaces` does, in runs with MetaLA layers. Other runs still call `original`.
    `neox_args` is the first argument of both."""

    def decorate(function: Callable) -> Callable:
        @replaces(original)
        def call(original, neox_args, *args, **kwargs):
            if not has_metala_layers(neox_args):
                return original(neox_args, *args, **kwargs)
            return function(original, neox_args, *args, **kwargs)

        return function

    return decorate


def overrides(owner: Any, name: str) -> Callable[[Callable], Callable]:
    """Decorates a function that takes the place of a method, or property, of a class, or of a
    method of one object. It takes the original and then the arguments of a call. Raises an
    AttributeError if there is no original: nobody would call the function."""

    def decorate(function: Callable) -> Callable:
        found = getattr(owner, name)
        is_property = isinstance(found, property)
        original = found.fget if is_property else found

        @functools.wraps(original)
        def call(*args, **kwargs):
            return function(original, *args, **kwargs)

        setattr(owner, name, property(call) if is_property else call)
        return function

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


def repairs(name: str, place: str, faulty: str = "") -> Callable[[Callable], Callable]:
    """Marks a function that repairs a fault upstream, in every program that calls it.

    Args:
        name: what it repairs, for the log line.
        place: the faulty function, as "module:name", or a whole module.
        faulty: text in the place's source that would be gone if the fault were; "" for a safety net
            that upstream does not have at all.
    """

    def is_needed() -> bool:
        module, _, path = place.partition(":")
        try:
            owner = functools.reduce(getattr, filter(None, path.split(".")), import_module(module))
            return faulty in inspect.getsource(owner)
        except (ImportError, AttributeError):
            return False  # the place is gone
        except OSError:
            return True  # without source nothing says otherwise

    def mark(function: Callable) -> Callable:
        function.repair, function.is_needed = name, is_needed
        return function

    return mark
