"""Imports go one way and are cheap."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("megatron_patch", ["torch"]),
        (
            "megatron_patch.ops",
            ["triton", "cuda.bindings.nvrtc", "fla", "causal_conv1d", "transformers", "deepspeed"],
        ),
        ("megatron_patch.neox", ["megatron", "deepspeed", "transformers", "wandb"]),
        ("megatron_patch.neox.settings", ["megatron", "deepspeed", "transformers", "wandb"]),
        ("megatron_patch.hf", ["megatron", "deepspeed", "megatron_patch.neox.registration"]),
    ],
)
def test_importing_loads_nothing_unwanted(module, unwanted):
    code = f"import sys, {module}; print([m for m in {unwanted} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
