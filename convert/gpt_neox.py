"""Where GPT-NeoX is."""

from __future__ import annotations

import os
from pathlib import Path

from convert.command import ConvertError

ROOT = Path(__file__).resolve().parent.parent


def find_neox() -> Path | None:
    """The checkout that `GPT_NEOX_PATH` names, else the one that set-up puts into third_party.

    Raises:
        ConvertError: `GPT_NEOX_PATH` names a folder that is none.
    """
    given = os.environ.get("GPT_NEOX_PATH")
    path = Path(given).resolve() if given else ROOT / "third_party" / "gpt-neox"
    if (path / "megatron" / "__init__.py").is_file():
        return path
    if given:
        raise ConvertError(f"GPT_NEOX_PATH={given} is no GPT-NeoX checkout")
    return None


def need_neox() -> Path:
    """As `find_neox`.

    Raises:
        ConvertError: there is no checkout.
    """
    path = find_neox()
    if path is None:
        raise ConvertError(
            "this needs GPT-NeoX: set GPT_NEOX_PATH to a checkout, or let scripts/setup.sh clone "
            f"one to {ROOT / 'third_party' / 'gpt-neox'}"
        )
    return path
