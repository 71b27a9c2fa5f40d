"""Runs the converter's commands inside the test process."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from convert import neox_to_hf
from tests.neox.fork_server import fork_server


def convert(program: ModuleType, checkout: Path, *arguments, is_linked: bool = True) -> None:
    """Runs a command of `convert` in this process, which has imported everything it needs. The
    processes that run GPT-NeoX's model are forked if the checkout is linked to the plugin."""
    with pytest.MonkeyPatch.context() as patch:
        if is_linked and "--verify" in arguments:
            patch.setattr("sys.executable", str(fork_server(checkout).python))
        patch.setenv("GPT_NEOX_PATH", str(checkout))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("sys.argv", [program.__name__, *map(str, arguments)])
        program.main()


def export(
    checkout: Path, checkpoint: Path, output: Path, *flags, is_linked: bool = True
) -> dict[str, torch.Tensor]:
    """Converts a checkpoint by the command, and returns the tensors of the Hugging Face folder."""
    arguments = ("--checkpoint", checkpoint, "--output", output, *flags)
    convert(neox_to_hf, checkout, *arguments, is_linked=is_linked)
    return load_file(output / "model.safetensors")
