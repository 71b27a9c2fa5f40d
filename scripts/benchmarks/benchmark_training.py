#!/usr/bin/env python3
"""Times training steps in GPT-NeoX, beside models of the same size with softmax attention.

    python scripts/benchmarks/benchmark_training.py                                # one GPU
    python scripts/benchmarks/benchmark_training.py --models metala llama gla \\
        --recompute nothing cheap most                                             # and memory
    python scripts/benchmarks/benchmark_training.py --micro-batch 1 --length 32768 --models metala
    python scripts/benchmarks/benchmark_training.py --gpus 2                       # data parallel
    python scripts/benchmarks/benchmark_training.py --gpus 2 --tensor-parallel 2

Prints, for each model: milliseconds of a step (mean, fastest and slowest interval), tokens per
second of all GPUs, the memory that PyTorch reserved on the first GPU, and parameters. Then MetaLA's
speed and memory divided by each of the others'. `--recompute` gives a row to each of these values
of `metala.recompute`.

It needs a linked GPT-NeoX checkout (`GPT_NEOX_PATH`, or the one of scripts/setup.sh). The stock
`deepy.py train.py` trains on random tokens with the settings of `--config`, without accumulation.
The numbers are those that GPT-NeoX prints after the first ten iterations. `documents` is `metala`
with `reset_at_document`; its documents have 1,024 tokens. `attention` has
GPT-NeoX's attention of type `flash` where flash-attn is installed, else `global`, with rotary
positions and MLPs of the same width. `llama` and `gla` are no GPT-NeoX: peer_step.py trains them in
a bare loop, on one GPU. `gla` needs flash-linear-attention and takes minutes before its first step.
It is measured where `--models` names it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peer_step import PEERS

from convert.command import need_neox
from megatron_patch.architecture import SettingsError
from megatron_patch.commands.command_line import (
    CommandError,
    Parser,
    existing_file,
    one_of,
    run_script,
    whole,
)
from megatron_patch.commands.link_neox import MARK, entry_point
from megatron_patch.indexed_dataset import IndexedDatasetWriter
from megatron_patch.neox.upstream_fixes.rendezvous import free_port
from megatron_patch.neox.yaml_config import merge_yaml

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("metala", "documents", "attention", *PEERS)
# What `training_settings` wants, beside --config and sizes, for a training on one GPU.
ONE_GPU = dict(gpus=1, tensor_parallel=1, context_parallel=1, sequence_parallel=False)
LEVELS = ("nothing", "cheap", "most")
TOKENS = 32_000
INTERVAL = 10  # GPT-NeoX prints the mean time of so many iterations; the first mean is left out
TIME = re.compile(r"elapsed time per iteration \(ms\): (\S+) \|")
MEMORY = re.compile(r"\| max reserved: (\S+)")
GRAPHS = re.compile(r"^.*MetaLA: (CUDA graphs .*)$", re.MULTILINE)
PARAMETERS = re.compile(r"number of parameters on model parallel rank 0: (\d+)")


@dataclass(frozen=True)
class Measurement:
    """One training's speed and memory.

    Attributes:
        milliseconds: an iteration's time, the mean of each interval after the first.
        tokens_per_second: all GPUs together.
        gigabytes: memory that PyTorch reserved on the first GPU.
        parameters: those of the first rank.
    """

    milliseconds: list[float]
    tokens_per_second: float
    gigabytes: float
    parameters: int


def write_data(folder: Path) -> dict[str, Any]:
    """Writes a tokenizer of TOKENS words and four million random tokens, in documents of 1,024 that
    end with <|endoftext|>; returns their settings."""
    from tokenizers import Tokenizer, models

    words = ["<|endoftext|>", "<|padding|>", *(f"w{i}" for i in range(TOKENS - 2))]
    vocabulary = {word: index for index, word in enumerate(words)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])).save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "tokens", vocab_size=TOKENS) as writer:
        for _ in range(4096):
            writer.add_document(np.append(rng.integers(1, TOKENS, size=1023), 0))
    return {
        "data_path": str(folder / "tokens"),
        "tokenizer_type": "HFTokenizer",
        "vocab_file": str(folder / "tokenizer.json"),
    }


def training_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of `--config` for the GPUs and steps asked for."""
    given = merge_yaml([options.config])
    needed = ("num_layers", "seq_length", "intermediate_size", "train_micro_batch_size_per_gpu")
    if missing := [name for name in needed if name not in given]:
        raise SettingsError(f"{options.config}: found no {missing[0]}, wanted a model's settings")
    micro = options.micro_batch or given["train_micro_batch_size_per_gpu"]
    length = options.length or given["seq_length"]
    ranks_of_a_sample = options.tensor_parallel * options.context_parallel
    return {
        **given,
        "seq_length": length,
        "max_position_embeddings": length,
        "num_gpus": options.gpus,
        "global_num_gpus": options.gpus,  # GPT-NeoX counts all of the machine's, used or not
        "model_parallel_size": options.tensor_parallel,
        "sequence_parallel": options.sequence_parallel,
        "metala": {
            **(given.get("metala") or {}),
            "context_parallel_size": options.context_parallel,
        },
        "train_batch_size": micro * options.gpus // ranks_of_a_sample,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "train_iters": options.steps,
        "lr_decay_iters": options.steps,
        "log_interval": INTERVAL,
        "split": "1,0,0",
        "use_wandb": False,
    }


def with_attention(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """Returns the settings with all layers of type `kind` in place of MetaLA."""
    rest = {key: value for key, value in settings.items() if key != "metala"}
    return {
        **rest,
        "attention_config": [[[kind], settings["num_layers"]]],
        "pos_emb": "rotary",
        # GPT-NeoX rounds a third of intermediate_size up to a multiple of this.
        "mlp_multiple_of": settings["intermediate_size"],
    }


def measure(
    checkout: Path,
    settings: dict[str, Any],
    folder: Path,
    name: str,
    program: str | Path = "train.py",
) -> Measurement:
    """Trains, and reads what was printed.

    Raises:
        CommandError: the training failed; its last 40 lines were printed to stderr.
    """
    config = folder / f"{name}.yml"
    config.write_text(yaml.safe_dump({**settings, "master_port": free_port()}))
    done = subprocess.run(
        [sys.executable, "./deepy.py", str(program), str(config)],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print(*done.stdout.splitlines()[-40:], sep="\n", file=sys.stderr)
        raise CommandError(f"training {name} failed with exit code {done.returncode}")
    for line in GRAPHS.findall(done.stdout):  # says how much memory they take
        print(f"  {line}")
    times = [float(time) for time in TIME.findall(done.stdout)][1:]
    tokens = settings["train_batch_size"] * settings["seq_length"]
    return Measurement(
        times,
        tokens / (statistics.mean(times) / 1e3),
        float(MEMORY.search(done.stdout)[1]) * 2**20 / 1e9,
        int(PARAMETERS.search(done.stdout)[1]),
    )


def measure_peer(model: str, settings: dict[str, Any], steps: int = 20) -> Measurement:
    """Runs peer_step.py for the sizes of a model in GPT-NeoX."""
    sizes = {
        "layers": settings["num_layers"],
        "width": settings["hidden_size"],
        "heads": settings["num_attention_heads"],
        "mlp": settings["intermediate_size"],
        "vocabulary": TOKENS,
        "length": settings["seq_length"],
        "micro-batch": settings["train_micro_batch_size_per_gpu"],
        "steps": steps,
    }
    flags = [str(part) for name, size in sizes.items() for part in (f"--{name}", size)]
    script = Path(__file__).with_name("peer_step.py")
    command = [sys.executable, script, "--model", model, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CommandError(f"{script.name} failed: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    tokens = sizes["micro-batch"] * sizes["length"]
    times = found["milliseconds"]
    return Measurement(
        times, tokens / (statistics.mean(times) / 1e3), found["gigabytes"], found["parameters"]
    )


def need_linked_neox() -> Path:
    """Returns the GPT-NeoX checkout. Raises an error if there is none that is linked."""
    checkout = need_neox()
    if MARK.encode() not in entry_point(checkout).read_bytes():
        raise CommandError(f"link it first: scripts/link_neox.py {checkout}")
    return checkout


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=existing_file, default=ROOT / "configs/metala_380m.yml")
    parser.add_argument("--gpus", type=whole(1), default=1, help="of this machine (default: 1)")
    parser.add_argument("--tensor-parallel", type=whole(1), default=1, help="ranks (default: 1)")
    parser.add_argument("--micro-batch", type=whole(1), help="sequences (default: as in --config)")
    parser.add_argument("--length", type=whole(1), help="tokens (default: as in --config)")
    parser.add_argument("--steps", type=whole(2 * INTERVAL), default=40, help="default: 40")
    parser.add_argument(
        "--models",
        nargs="+",
        type=one_of(MODELS),
        default=[name for name in MODELS if name != "gla"],
        help=f"of {', '.join(MODELS)} (default: all but gla)",
    )
    parser.add_argument(
        "--recompute",
        nargs="+",
        type=one_of(LEVELS),
        help=f"of {', '.join(LEVELS)} (default: as in --config)",
    )
    options = parser.parse_args(argv)
    options.context_parallel, options.sequence_parallel = 1, False
    if options.gpus % options.tensor_parallel:
        parser.error(f"--gpus: found {options.gpus}, wanted a multiple of --tensor-parallel")
    if torch.cuda.is_available() and options.gpus > torch.cuda.device_count():
        parser.error(f"--gpus: found {options.gpus}, wanted {torch.cuda.device_count()} or fewer")
    settings = training_settings(options)
    checkout = need_linked_neox()

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{options.gpus} x {device}, torch {torch.__version__}: {options.config.name}, "
        f"tensor parallel {options.tensor_parallel}, {settings['train_batch_size']} sequences of "
        f"{settings['seq_length']:,} tokens a step",
        flush=True,
    )
    kind = "flash" if find_spec("flash_attn") else "global"
    own = settings.get("metala") or {}
    models = {"metala": settings}
    if options.recompute:
        models = {
            f"metala, {level}": {**settings, "metala": {**own, "recompute": level}}
            for level in options.recompute
        }
    models |= {
        "documents": {**settings, "metala": {**own, "reset_at_document": True}},
        f"attention, {kind}": with_attention(settings, kind),
    }
    models = {name: model for name, model in models.items() if name.split(",")[0] in options.models}
    head = f"{'':<20}{'step':>12}{'intervals':>20}{'tokens/s':>12}{'memory':>11}"
    print(f"{head}{'parameters':>14}")
    found, failures = {}, []
    with tempfile.TemporaryDirectory() as work:
        data = write_data(Path(work))
        for name, model in models.items():
            found[name] = measure(checkout, {**model, **data}, Path(work), name)
            report(name, found[name])
    peers = [name for name in PEERS if name in options.models]
    if peers and (options.gpus > 1 or not torch.cuda.is_available()):
        print(f"{', '.join(peers)}: not measured, wanted one GPU")
        peers = []
    for name in peers:
        try:
            found[name] = measure_peer(name, settings)
            report(name, found[name])
        except CommandError as error:  # the others are compared all the same
            failures.append(error)
    ours = {name: found.pop(name) for name in list(found) if name.split(",")[0] == "metala"}
    for name, other in found.items():
        for own_name, own in ours.items():
            speed = own.tokens_per_second / other.tokens_per_second
            memory = own.gigabytes / other.gigabytes if other.gigabytes else float("nan")
            print(f"{f'{own_name} / {name}':<52}{speed:>12.2f}{memory:>8.2f}")
    if failures:
        raise failures[0]


def report(name: str, one: Measurement) -> None:
    """Prints a model's row."""
    span = f"{min(one.milliseconds):.1f} to {max(one.milliseconds):.1f}"
    print(
        f"{name:<20}{statistics.mean(one.milliseconds):>9.1f} ms{span:>20}"
        f"{one.tokens_per_second:>12,.0f}{one.gigabytes:>8.1f} GB{one.parameters:>14,}",
        flush=True,
    )


if __name__ == "__main__":
    run_script(main)
