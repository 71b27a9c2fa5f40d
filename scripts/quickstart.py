#!/usr/bin/env python3
"""Runs the quickstart: each step prints the command a user would type, and runs it.

runs/quickstart holds the text, tokenizer and data, a folder for each engine (GPT-NeoX, the Hugging
Face Trainer) with its checkpoints and the Hugging Face model, and summary.json. Run again, it goes
on where it stopped. Exit code 1 if the loss fell by less than 30 %, or if the verification
failed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from plot_loss import plot, read_losses
from tqdm import tqdm

from megatron_patch.commands.command_line import Parser, replacing
from megatron_patch.commands.link_neox import commit_of
from megatron_patch.neox.yaml_config import merge_yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "quickstart"
MODEL_CONFIG = ROOT / "configs" / "metala_tiny.yml"
TEXT_BYTES = 8_000_000
VOCABULARY = 4096
WANTED_FALL = 0.3
WANTED_DIFFERENCE = 1e-4
PROMPT = "def read(self"
SAMPLE_TOKENS = 100


class StepFailed(Exception):
    """A command of the quickstart failed. The message names it and the file with its output."""


def show(path: Path) -> str:
    """Returns a path as a user in the repository's folder would write it."""
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def print_command(arguments: list[str | Path], folder: Path = ROOT) -> None:
    """Prints a Python command as a user would type it."""
    shown = [show(a) if isinstance(a, Path) and folder == ROOT else str(a) for a in arguments]
    place = "" if folder == ROOT else f"cd {show(folder)} && "
    print(f"$ {place}python {' '.join(shown)}", flush=True)


def run(
    arguments: list[str | Path],
    log: Path | None = None,
    folder: Path = ROOT,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Runs a Python command and returns its output, which is shown after the command, or appended
    to `log`. Calls `on_line` with each line. Raises StepFailed if the exit code is not 0."""
    if not log:
        print_command(arguments, folder)
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if log else None,
        text=True,
        errors="replace",
    )
    lines = []
    try:
        with open(log or os.devnull, "a") as file:
            for line in process.stdout:
                lines.append(line)
                file.write(line)
                file.flush()
                if not log:
                    print(line, end="", flush=True)
                if on_line:
                    on_line(line)
    finally:
        # After Ctrl-C, GPT-NeoX's launcher needs time to end its ranks.
        if process.poll() is None:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
    if process.returncode:
        if log:
            sys.stderr.writelines(line[:300].rstrip() + "\n" for line in lines[-25:])
        where = f"; its output is in {show(log)}" if log else ""
        raise StepFailed(f"{arguments[0]} failed with exit code {process.returncode}{where}")
    return "".join(lines)


def write_text(path: Path) -> None:
    """Writes the sources of Python's standard library as JSON lines, up to TEXT_BYTES. Their order
    is shuffled reproducibly, because the last documents become the validation set."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    left_out |= {"encodings", "pydoc_data"}  # tables and manuals, not code
    files = [
        p.relative_to(library)
        for p in library.rglob("*.py")
        if not left_out & set(p.relative_to(library).parts)
    ]
    files.sort(key=lambda p: hashlib.sha256(p.as_posix().encode()).digest())
    size = 0
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as out:
        for file in tqdm(files, desc=f"Reading {library}", unit=" files"):
            try:
                text = (library / file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            out.write(json.dumps({"text": text, "file": file.as_posix()}) + "\n")
            size += len(text)
            if size > TEXT_BYTES:
                break


def prepare_data() -> tuple[Path, Path]:
    """Makes text, tokenizer and token files; returns the tokenizer's path and the data's prefix."""
    text, tokenizer = FOLDER / "text.jsonl", FOLDER / "tokenizer.json"
    prefix = FOLDER / "data" / "text_document"
    heading("Text: the Python standard library's sources")
    if not text.exists():
        write_text(text)
        tokenizer.unlink(missing_ok=True)
    print(f"{show(text)}: {text.stat().st_size / 1e6:.1f} MB")
    heading("Tokenizer and data")
    if not tokenizer.exists():
        size = ["--vocab-size", str(VOCABULARY)]
        run(["scripts/train_tokenizer.py", text, "--output", tokenizer, *size])
        prefix.with_suffix(".idx").unlink(missing_ok=True)
    if not prefix.with_suffix(".idx").exists():
        inputs = [text, "--tokenizer", tokenizer]
        run(["scripts/prepare_data.py", *inputs, "--output", prefix, "--overwrite"])
    print(f"{show(tokenizer)}, {show(prefix)}.bin, .idx")
    return tokenizer, prefix


def write_local_config(folder: Path, tokenizer: Path, prefix: Path) -> Path:
    """Writes the YAML file with the paths of data and checkpoints, as local_setup.yml does."""
    wandb = os.environ.get("WANDB_MODE") == "offline" or "WANDB_API_KEY" in os.environ
    settings = {
        "data_path": str(prefix),
        "tokenizer_type": "HFTokenizer",
        "vocab_file": str(tokenizer),
        "save": str(folder / "checkpoints"),
        "load": str(folder / "checkpoints"),
        "num_gpus": 1,
        "use_wandb": wandb,
        "wandb_project": "metala-quickstart",
    }
    path = folder / "quickstart_local.yml"
    path.write_text(json.dumps(settings, indent=2) + "\n")
    return path


def start_anew_if_changed(folder: Path, *inputs: Path) -> None:
    """Removes an engine's folder if it was trained with other settings or another tokenizer."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()
    used = folder / "inputs.sha256"
    if folder.exists() and (not used.exists() or used.read_text() != digest):
        print(f"{show(folder)} is of other settings or another tokenizer: starting anew")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    used.write_text(digest)


def largest_difference(output: str) -> float:
    """Returns the largest logit difference that a verifying command printed."""
    found = re.findall(r"[Ll]argest logit difference[a-z ]*:? *([0-9.e+-]+|nan|inf)", output)
    if not found:
        raise StepFailed("the verification printed no largest logit difference")
    return float(found[-1])


def train_in_neox(checkout: Path, local: Path, checkpoint: Path, log: Path) -> None:
    """Trains with GPT-NeoX's own launcher, which goes on from the last checkpoint if there is one.
    Raises StepFailed if that does not leave `checkpoint`."""
    latest = checkpoint.parent / "latest"

    def is_done() -> bool:
        return latest.exists() and latest.read_text().strip() == checkpoint.name

    if is_done():
        print(f"{show(checkpoint)}: already trained (--fresh trains again)")
        return
    arguments = ["./deepy.py", "train.py", MODEL_CONFIG, local]
    print_command(arguments, checkout)
    print(f"Its output goes to {show(log)}. The first start compiles a helper.")
    iterations = int(checkpoint.name.removeprefix("global_step"))
    bar = tqdm(total=iterations, desc="Training", mininterval=0)

    def advance(line: str) -> None:
        if match := re.search(r"iteration\s+(\d+)/.*?lm_loss: (\S+)", line):
            if not bar.n:
                bar.n = bar.initial = int(match[1])  # leaves earlier steps out of the speed
            bar.set_postfix(loss=f"{float(match[2]):.3f}", refresh=False)
            bar.update(int(match[1]) - bar.n)

    with bar:
        run(arguments, log, checkout, on_line=advance)
    if not is_done():
        raise StepFailed(f"training left no {show(checkpoint)}; see {show(log)}")


def write_sample(folder: Path) -> str:
    """Returns a sampled continuation of PROMPT by the exported model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import megatron_patch.hf  # noqa: F401  (registers MetaLA with the Auto classes)

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    torch.manual_seed(0)
    tokens = model.generate(
        **tokenizer(PROMPT, return_tensors="pt"),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=True,
        temperature=0.8,
        top_k=50,
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="remove runs/quickstart first")
    args = parser.parse_args()
    started = time.monotonic()
    if args.fresh and FOLDER.exists():
        shutil.rmtree(FOLDER)
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Threads that spin while they wait slow training tenfold on a busy CPU.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    checkout = Path(os.environ["GPT_NEOX_PATH"]) if os.environ.get("GPT_NEOX_PATH") else None

    tokenizer, prefix = prepare_data()
    title = "GPT-NeoX" if checkout else "Hugging Face Trainer"
    folder = FOLDER / ("neox" if checkout else "trainer")
    start_anew_if_changed(folder, MODEL_CONFIG, tokenizer)
    local = write_local_config(folder, tokenizer, prefix)
    checkpoints, model = folder / "checkpoints", folder / "hf"
    step = "global_step" if checkout else "checkpoint-"
    checkpoint = checkpoints / f"{step}{merge_yaml([MODEL_CONFIG])['train_iters']}"
    if checkout:
        heading(f"Training with GPT-NeoX in {show(checkout)}")
        log = folder / "train.log"
        train_in_neox(checkout, local, checkpoint, log)
        heading("Export to Hugging Face, and verification")
        flags = ["--tokenizer", tokenizer, "--verify", "--overwrite"]
        script = ["convert/neox_to_hf.py", "--checkpoint", checkpoints, "--output", model]
    else:
        heading("Training with the Hugging Face Trainer, export and verification")
        log = checkpoints / "metrics.jsonl"
        flags = ["--output", model, "--verify"]
        script = ["scripts/train_hf.py", MODEL_CONFIG, local]
    difference = largest_difference(run([*script, *flags]))
    heading("A sample")
    sample = write_sample(model)
    print(sample)

    losses = read_losses(log)
    picture = FOLDER / "loss.png"
    plot({title: losses}, picture, "MetaLA tiny")
    first, last = next(iter(losses.train.values())), next(reversed(losses.train.values()))
    summary = {
        "engine": folder.name,
        "neox_commit": commit_of(checkout) if checkout else None,
        "first_loss": first,
        "last_loss": last,
        "checkpoint": show(checkpoint),
        "hf_model": show(model),
        "max_logit_diff": difference,
        "sample": sample,
        "loss_curve": show(picture),
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    learned = last <= (1 - WANTED_FALL) * first
    equal = difference <= WANTED_DIFFERENCE

    heading(f"Summary ({time.monotonic() - started:.0f} s)")
    print(f"loss          {first:.3f} -> {last:.3f} ({last / first - 1:+.0%})", end="")
    print("" if learned else f"   FAILED: wanted {-WANTED_FALL:+.0%} or better")
    print(f"verification  largest logit difference {difference:.1e}", end="")
    print("" if equal else f"   FAILED: wanted at most {WANTED_DIFFERENCE:.0e}")
    print(f"checkpoint    {summary['checkpoint']}")
    print(f"model         {summary['hf_model']}   (AutoModelForCausalLM.from_pretrained)")
    print(f"loss curve    {summary['loss_curve']}")
    print(f"all of it     {show(FOLDER / 'summary.json')}")
    return 0 if learned and equal else 1


if __name__ == "__main__":
    # Exits through `finally`, so that the running command ends too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main())
    except StepFailed as failure:
        sys.exit(f"quickstart: {failure}")
    except KeyboardInterrupt:
        sys.exit("quickstart: interrupted; the same command goes on from here")
