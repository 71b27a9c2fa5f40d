"""Are the kernels right on this GPU? `python -m pytest -m gpu tests/gpu` needs torch, triton, numpy
and pytest alone."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Marks the tests of this folder, and skips them where there is no GPU."""
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip("needs a CUDA device, found none"))


@pytest.fixture
def nan_in_new_memory():
    """Fills what `torch.empty` returns with NaN, so that an element that no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
