"""Which Python packages a run can import."""

from __future__ import annotations

from importlib.util import find_spec


def is_installed(name: str) -> bool:
    """Returns whether a package is there. A folder of logs in the current folder, such as
    `tensorboard` or `wandb`, is none, though Python would import it: it has no `__init__.py`."""
    try:
        spec = find_spec(name)
    except ValueError:  # a module that somebody made stands for it
        return True
    return spec is not None and spec.origin is not None
