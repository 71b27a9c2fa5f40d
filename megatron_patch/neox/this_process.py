"""Which process of a run this is. DeepSpeed's launcher tells each rank its number by variables."""

from __future__ import annotations

import os


def in_launcher() -> bool:
    """Returns whether this process is `deepy.py`, which checks the settings before the ranks do."""
    return "LOCAL_RANK" not in os.environ


def is_first_here() -> bool:
    """Returns whether this process is the first rank of its host, or no rank."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0
