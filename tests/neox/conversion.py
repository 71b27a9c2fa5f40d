"""The converter's commands, as tests run them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from convert import neox_to_hf


def convert(program: ModuleType, checkout: Path, *arguments) -> None:
    """Runs a command of `convert` in this process, which has loaded all that it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT_NEOX_PATH", str(checkout))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("sys.argv", [program.__name__, *map(str, arguments)])
        program.main()


def export(checkout: Path, checkpoint: Path, output: Path, *flags) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint's Hugging Face folder, by the converter's command."""
    convert(neox_to_hf, checkout, "--checkpoint", checkpoint, "--output", output, *flags)
    return load_file(output / "model.safetensors")
