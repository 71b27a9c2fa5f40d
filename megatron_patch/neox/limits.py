"""Values that GPT-NeoX takes, and with which it does not do what they say."""

from __future__ import annotations

import math
import os

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.run_checks import program

MOST_DATA_SETS = 254  # `BlendableDataset` keeps their numbers in uint8, and asserts


def check_limits(args) -> None:
    """Checks the settings of a run with metala layers, in the launcher and on each rank.

    Raises:
        SettingsError: more data sets than GPT-NeoX can blend.
    """
    if "metala" not in (args.attention_config or ()):
        return
    for prefix in ("", "pos_", "neg_"):
        for split in ("train", "valid", "test"):
            name = f"{prefix}{split}_data_paths"
            if len(paths := getattr(args, name, None) or ()) > MOST_DATA_SETS:
                raise SettingsError(
                    f"{name}: found {len(paths)}, wanted at most {MOST_DATA_SETS}: GPT-NeoX can "
                    "blend no more"
                )
    is_launcher = "LOCAL_RANK" not in os.environ
    if is_launcher and program(args) == "train.py" and args.train_iters:
        fraction = 1.0 if args.lr_decay_fraction is None else args.lr_decay_fraction
        warn_of_short_warmup(
            args.warmup, args.lr_decay_iters or max(1, math.floor(args.train_iters * fraction))
        )


def warn_of_short_warmup(warmup: float, iterations: int) -> None:
    """A warm-up of less than one step makes the first step's learning rate larger than `lr`."""
    if 0 < warmup * iterations < 1:
        print(
            f"MetaLA: warmup: {warmup} of {iterations} iterations is less than one, which makes "
            f"the first learning rate {1 / (warmup * iterations):.3g} times lr, as in GPT-NeoX; "
            f"0 is no warm-up, {1 / iterations:.3g} one iteration",
            flush=True,
        )
