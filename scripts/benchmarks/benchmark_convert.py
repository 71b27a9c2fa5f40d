"""Times the conversion of a synthetic GPT-NeoX checkpoint beside a plain copy of its files, and
measures its memory.

    python scripts/benchmarks/benchmark_convert.py --folder /disk/with/room
    python scripts/benchmarks/benchmark_convert.py --folder /tmp --config configs/metala_tiny.yml

Prints, for `mp_rank` checkpoints (`--form whole`) and layer-file checkpoints (`--form pipeline`):
seconds and MB/s of copy and conversion, their ratio, and the peak memory.

- Disk: checkpoint, copy and Hugging Face folder lie in a temporary folder inside `--folder`. They
  take three times the size of the model and are removed at the end.
- Time: medians, without the start of Python and its imports. Copy and conversion alternate. Each
  starts with the checkpoint dropped from the page cache and ends after fsync.
- Memory: of one conversion in a process of its own, above what it has after its imports. The
  resident set includes mapped pages of files; anonymous memory cannot be given back under pressure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from convert.command import ConvertError
from convert.hf_io import size_argument
from convert.neox_reader import check_tensor_parallel, described_model
from convert.neox_writer import padded_vocabulary, write_checkpoint
from convert.tensor_table import TensorRule, tensor_table
from megatron_patch.architecture import Architecture
from megatron_patch.architecture_neox import with_defaults
from megatron_patch.commands.command_line import (
    Parser,
    existing_file,
    existing_folder,
    one_of,
    run_script,
    whole,
)
from megatron_patch.neox.yaml_config import merge_yaml

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 32_000
DTYPE = torch.bfloat16
FORMS = {"whole": 0, "pipeline": 1}  # pipe_parallel_size of mp_rank and of layer-file checkpoints


def write_tokenizer(path: Path) -> None:
    """Writes a tokenizer.json of TOKENS words."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"w{i}": i for i in range(TOKENS)}, unk_token="w0")).save(str(path))


def write_synthetic(
    folder: Path, shape: Architecture, settings: Mapping[str, Any], tensor_parallel: int, pipe: int
) -> None:
    """Writes a checkpoint. Its tensors are slices of one block of random numbers, which start at
    different offsets."""
    block = torch.randn(2**24 + 2**16, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    offsets: dict[TensorRule, int] = {}

    def full(rule: TensorRule) -> torch.Tensor:
        offset = offsets.setdefault(rule, 97 * len(offsets))
        size = math.prod(rule.shape)
        values = block[offset : offset + min(size, 2**24)]
        return values.repeat(-(-size // len(values)))[:size].view(rule.shape)

    folder.mkdir()
    configs = {"run.yml": yaml.safe_dump(dict(settings))}
    write_checkpoint(folder, shape, full, tensor_parallel, pipe, 1000, settings, configs)


def flush(folder: Path, drop: bool) -> None:
    """Writes a folder's files to the disk; with `drop`, drops them from the page cache too."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            if drop:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def folder_bytes(folder: Path) -> int:
    """Returns the size of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy_seconds(source: Path, target: Path) -> float:
    """Returns the seconds that a plain copy takes, fsync included."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    flush(target, drop=False)
    return time.perf_counter() - start


def convert_in_child(source: Path, target: Path, max_shard_size: int) -> dict[str, float]:
    """Converts in a new process and returns what `child` prints there. Raises a ConvertError if the
    conversion failed; the child has said why."""
    command = [sys.executable, __file__, "--child", source, target, max_shard_size]
    process = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if process.returncode:
        raise ConvertError(f"the conversion failed with exit code {process.returncode}")
    return json.loads(process.stdout.splitlines()[-1])


def memory(key: str) -> int:
    """Returns an entry of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def child(source: Path, target: Path, max_shard_size: int) -> None:
    """Converts; prints seconds and peak bytes (resident, anonymous) as JSON."""
    import tokenizers  # noqa: F401
    from transformers import GenerationConfig  # noqa: F401

    import megatron_patch.hf.remote_code  # noqa: F401
    from convert.neox_to_hf import neox_to_hf

    resident, anonymous = memory("VmRSS"), memory("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of VmRSS
    peak_anonymous = anonymous
    done = threading.Event()

    def sample() -> None:
        nonlocal peak_anonymous
        while not done.wait(0.005):
            peak_anonymous = max(peak_anonymous, memory("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        start = time.perf_counter()
        neox_to_hf(source, target, max_shard_bytes=max_shard_size)
        flush(target, drop=False)
        seconds = time.perf_counter() - start
    finally:  # else the thread would keep the process alive
        done.set()
        sampler.join()
    found = {
        "seconds": seconds,
        "resident": memory("VmHWM") - resident,
        "anonymous": peak_anonymous - anonymous,
    }
    print(json.dumps(found))


def main() -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--folder", type=existing_folder, required=True, help="a folder on the disk to test")
    add("--config", type=existing_file, default=ROOT / "configs" / "metala_3b.yml")
    add("--tensor-parallel", type=whole(1), default=2)
    add("--form", type=one_of(FORMS), nargs="+", default=list(FORMS))
    add("--max-shard-size", type=size_argument, default="5GB")
    add("--repeats", type=whole(1), default=3)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="benchmark-convert-", dir=options.folder) as name:
        work = Path(name)
        write_tokenizer(work / "tokenizer.json")
        settings = {
            **merge_yaml([options.config]),
            "tokenizer_type": "HFTokenizer",
            "vocab_file": str(work / "tokenizer.json"),
            "model_parallel_size": options.tensor_parallel,
        }
        args = with_defaults(settings)
        degree = args.model_parallel_size
        rows = padded_vocabulary(TOKENS, args.make_vocab_size_divisible_by, degree)
        shape = described_model(settings, rows)
        check_tensor_parallel(shape, degree)
        table = tensor_table(shape)
        parameters = sum(math.prod(rule.shape) for rule in table)
        largest = max(math.prod(rule.shape) for rule in table) * DTYPE.itemsize
        print(
            f"{options.config.name}: {parameters:,} parameters in {str(DTYPE)[6:]}, largest tensor "
            f"{largest / 1e6:.0f} MB, tensor parallel {options.tensor_parallel}"
        )
        for form in options.form:
            measure(form, work, shape, settings, options)


def measure(
    form: str,
    work: Path,
    shape: Architecture,
    settings: Mapping[str, Any],
    options: argparse.Namespace,
) -> None:
    """Times one kind of checkpoint and prints the result."""
    source, copied, converted = work / form, work / "copy", work / "hf"
    own = {**settings, "pipe_parallel_size": FORMS[form]}
    write_synthetic(source, shape, own, options.tensor_parallel, FORMS[form])
    copies, conversions = [], []
    for _ in range(options.repeats):
        flush(source, drop=True)
        copies.append(copy_seconds(source, copied))
        shutil.rmtree(copied)
        flush(source, drop=True)
        conversions.append(convert_in_child(source, converted, options.max_shard_size))
        shutil.rmtree(converted)
    size = folder_bytes(source)
    copy_time = statistics.median(copies)
    convert_time = statistics.median(found["seconds"] for found in conversions)
    resident = max(found["resident"] for found in conversions)
    anonymous = max(found["anonymous"] for found in conversions)
    print(f"\n{form} form, {size / 1e9:.2f} GB")
    print(f"  copy       {copy_time:8.2f} s   {size / copy_time / 1e6:6.0f} MB/s")
    print(f"  conversion {convert_time:8.2f} s   {size / convert_time / 1e6:6.0f} MB/s")
    print(f"  speed, of the copy's    {copy_time / convert_time:6.0%}")
    print(f"  peak resident set   {resident / 1e6:8.0f} MB")
    print(f"  peak anonymous      {anonymous / 1e6:8.0f} MB")
    print(f"  all seconds: copy {[round(s, 2) for s in copies]}, conversion ", end="")
    print([round(found["seconds"], 2) for found in conversions], flush=True)
    shutil.rmtree(source)


if __name__ == "__main__":
    command = main
    if sys.argv[1:2] == ["--child"]:
        command = partial(child, Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    run_script(command)
