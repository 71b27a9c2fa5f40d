#!/usr/bin/env python3
"""Times training steps at growing lengths: MetaLA in GPT-NeoX, and a compiled LLaMA of equal size.

    python scripts/benchmarks/benchmark_lengths.py results.json        # on one GPU
    python scripts/benchmarks/benchmark_lengths.py results.json --plot docs/training_length.png

Each step has --tokens tokens, or one sequence where that is longer. A length that is in the file is
not measured again, so the second command draws what the first one measured. The picture leaves out
what failed, such as a model that does not fit into memory. benchmark_training.py says what is
measured and how.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmark_training import (
    ONE_GPU,
    ROOT,
    Measurement,
    measure,
    measure_peer,
    report,
    training_settings,
    write_data,
)

from convert.command import ConvertError, need_neox
from megatron_patch.architecture import SettingsError
from megatron_patch.commands.command_line import (
    CommandError,
    Parser,
    existing_file,
    picture,
    run_script,
    whole,
)

LENGTHS = (2048, 8192, 32_768, 131_072)
MODELS = ("MetaLA", "LLaMA, compiled")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a JSON file, read if it exists and written")
    parser.add_argument("--config", type=existing_file, default=ROOT / "configs/metala_380m.yml")
    parser.add_argument("--lengths", type=whole(1), nargs="+", default=LENGTHS, metavar="N")
    parser.add_argument("--tokens", type=whole(1), default=16_384, help="default: 16384")
    parser.add_argument("--plot", type=picture, metavar="PATH", help="a picture of the results")
    options = parser.parse_args(argv)
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    failures = []
    for length in options.lengths:
        for model in MODELS:
            key = f"{model} {length}"
            if key not in found:
                try:
                    found[key] = asdict(run(model, length, options))
                except CommandError as error:  # the others are compared all the same
                    print(f"{key}: {error}")
                    failures.append(error)
                    continue
                options.results.write_text(json.dumps(found, indent=1) + "\n")
            report(key, Measurement(**found[key]))
    if options.plot:
        draw(found, options.plot)
    if failures:
        raise failures[0]


def run(model: str, length: int, options: argparse.Namespace) -> Measurement:
    """Trains one model at one length."""
    batch = max(options.tokens // length, 1)
    sizes = dict(config=options.config, length=length, micro_batch=batch, steps=30)
    settings = training_settings(argparse.Namespace(**ONE_GPU, **sizes))
    if model == "MetaLA":
        with tempfile.TemporaryDirectory() as work:
            data = write_data(Path(work))
            return measure(need_neox(), {**settings, **data}, Path(work), "metala")
    # Attention takes seconds a step at 131,072 tokens.
    return measure_peer("llama", settings, steps=20 if length <= 8192 else 3)


def draw(found: dict[str, dict], path: Path) -> None:
    """Draws tokens per second, and memory, against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for model in MODELS:
        points = {
            int(key.removeprefix(f"{model} ")): Measurement(**one)
            for key, one in found.items()
            if key.startswith(model)
        }
        tokens_per_second = [one.tokens_per_second / 1e3 for one in points.values()]
        speed.plot(points.keys(), tokens_per_second, "o-", label=model)
        memory.plot(points.keys(), [one.gigabytes for one in points.values()], "o-", label=model)
    for axes, title in ((speed, "thousand tokens/s"), (memory, "GB reserved")):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="tokens in a sequence", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    run_script(main, ConvertError, SettingsError)
