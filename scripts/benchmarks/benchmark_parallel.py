#!/usr/bin/env python3
"""Times training steps in GPT-NeoX where GPUs share the work, beside one GPU in the same run.

    python scripts/benchmarks/benchmark_parallel.py                  # two GPUs, metala_380m.yml
    python scripts/benchmarks/benchmark_parallel.py --gpus 4 --config configs/metala_1b.yml

Each layout has the sequences of `--config` times the number of GPUs in a step, so as many tokens a
GPU as one GPU alone. Prints for each: milliseconds of a step, tokens per second of one GPU, that
number divided by the one of a single GPU, and the memory that PyTorch reserved on the first GPU.
It needs a linked GPT-NeoX checkout, as benchmark_training.py does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmark_training import (
    ONE_GPU,
    ROOT,
    measure,
    need_linked_neox,
    training_settings,
    write_data,
)

from convert.command import ConvertError
from megatron_patch.architecture import SettingsError
from megatron_patch.commands.command_line import Parser, existing_file, one_of, run_script, whole

LAYOUTS = ("data", "context", "tensor", "sequence")


def layout_of(name: str, gpus: int) -> tuple[str, dict[str, Any]]:
    """Returns a title and what differs from one GPU, for one of LAYOUTS."""
    if name == "sequence":
        title = f"tensor {gpus}, sequence parallel"
        return title, dict(gpus=gpus, tensor_parallel=gpus, sequence_parallel=True)
    return f"{name} parallel {gpus}", {"gpus": gpus} | (
        {} if name == "data" else {f"{name}_parallel": gpus}
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=existing_file, default=ROOT / "configs/metala_380m.yml")
    parser.add_argument("--gpus", type=whole(2), default=2, help="of this machine (default: 2)")
    parser.add_argument(
        "--layouts",
        type=one_of(LAYOUTS),
        nargs="+",
        default=LAYOUTS,
        metavar="LAYOUT",
        help=f"of {', '.join(LAYOUTS)} (default: all), in this order, after one GPU",
    )
    parser.add_argument("--micro-batch", type=whole(1), help="sequences (default: as in --config)")
    parser.add_argument("--steps", type=whole(20), default=40, help="default: 40")
    options = parser.parse_args(argv)
    if (there := torch.cuda.device_count()) < options.gpus:
        parser.error(f"--gpus: found {there} GPUs on this machine, wanted {options.gpus}")
    checkout = need_linked_neox()
    print(
        f"{options.gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}: "
        f"{options.config.name}\n{'':<28}{'step':>12}{'tokens/s a GPU':>16}{'':>8}{'memory':>11}",
        flush=True,
    )
    layouts = [("one GPU", {}), *(layout_of(name, options.gpus) for name in options.layouts)]
    alone = None
    with tempfile.TemporaryDirectory() as work:
        data = write_data(Path(work))
        for name, layout in layouts:
            settings = settings_of(options, {**ONE_GPU, **layout})
            found = measure(checkout, {**settings, **data}, Path(work), name)
            speed = found.tokens_per_second / layout.get("gpus", 1)
            alone = alone or speed
            print(
                f"{name:<28}{statistics.mean(found.milliseconds):>9.1f} ms{speed:>16,.0f}"
                f"{speed / alone:>8.1%}{found.gigabytes:>8.1f} GB",
                flush=True,
            )


def settings_of(options: argparse.Namespace, layout: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a layout. Ranks that share samples get more of them."""
    sizes = dict(config=options.config, length=None, micro_batch=options.micro_batch)
    given = argparse.Namespace(**sizes, **layout, steps=options.steps)
    micro = training_settings(given)["train_micro_batch_size_per_gpu"]
    given.micro_batch = micro * layout["tensor_parallel"] * layout["context_parallel"]
    return training_settings(given)


if __name__ == "__main__":
    run_script(main, ConvertError, SettingsError)
