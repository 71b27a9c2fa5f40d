"""Selects Triton's interpreter on machines without a GPU, before anything imports Triton."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    reason = "Triton was imported before its interpreter was chosen: set TRITON_INTERPRET=1"
    for item in items:
        if "ops/triton" in str(item.path):
            item.add_marker(pytest.mark.skip(reason))
