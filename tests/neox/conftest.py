"""Fixtures of the tests that run GPT-NeoX."""

from __future__ import annotations

import pytest

from tests.neox.process import NeoXProcess
from tests.neox.training import settings


@pytest.fixture(scope="module")
def in_neox(neox_checkout, tmp_path_factory):
    """Returns a function that runs code in a process with GPT-NeoX; see `NeoXProcess`."""
    return NeoXProcess(neox_checkout, tmp_path_factory.mktemp("in_neox"))


@pytest.fixture
def config(token_data, tokenizer_file) -> dict:
    """Returns the settings of a two-layer model on the test data."""
    return settings(token_data, tokenizer_file)
