"""What the tests of one GPT-NeoX process share."""

from __future__ import annotations

import pytest

from tests.neox.process import NeoXProcess
from tests.neox.training import settings


@pytest.fixture(scope="module")
def in_neox(neox_checkout, tmp_path_factory):
    """Function: runs code in a process that has imported GPT-NeoX; see `NeoXProcess`."""
    process = NeoXProcess(neox_checkout, tmp_path_factory.mktemp("in_neox"))
    yield process
    process.close()


@pytest.fixture
def config(token_data, tokenizer_file) -> dict:
    """The settings of a two-layer model on the test data."""
    return settings(token_data, tokenizer_file)
