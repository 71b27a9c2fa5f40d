"""Wrong arguments of any script give one line that names the argument, and write nothing."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NO_FILE = "wanted a file or folder that is there and can be read"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """The current folder, with files of several kinds, none of which is what a script wants."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "junk.json").write_text("{]")
    (tmp_path / "list.yml").write_text("- 1\n")
    (tmp_path / "little.yml").write_text("num_layers: 2\n")
    (tmp_path / "loss.log").write_text("iteration 1/ 2 | lm_loss: abc |")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_here(run_command):
    """Function: runs a script in this process; returns its exit code and standard error."""

    def run(script: str, arguments: str) -> tuple[int, str]:
        folder = "benchmarks/" if script.startswith("benchmark_") else ""
        result = run_command(folder + script, *arguments.split())
        return result.returncode, result.stderr

    return run


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


PREPARE = "text.txt --output out/data --tokenizer"
CASES = [
    ("prepare_data.py", f"{PREPARE} no", f"--tokenizer: found no, {NO_FILE}"),
    ("prepare_data.py", f"{PREPARE} folder", "--tokenizer: found the folder folder, wanted a file"),
    ("prepare_data.py", f"{PREPARE} empty.txt", "--tokenizer: found the empty file empty.txt"),
    ("prepare_data.py", f"{PREPARE} junk.json", "--tokenizer: found junk.json .*wanted a token"),
    ("prepare_data.py", f"no {PREPARE} TOKENIZER", f"inputs: found no, {NO_FILE}"),
    ("prepare_data.py", "--output x --tokenizer TOKENIZER empty.txt blank.txt", "inputs: found no"),
    ("prepare_data.py", f"{PREPARE} TOKENIZER --max-stretch 0", "--max-stretch: found 0, wanted"),
    ("prepare_data.py", "text.txt --output text.txt/x --tokenizer a", "--output: found text.txt/x"),
    ("prepare_data.py", "text.txt --output folder/ --tokenizer a", "--output: found the folder"),
    ("prepare_data.py", "text.txt --output x", "the following arguments are required: --tokenizer"),
    ("train_tokenizer.py", "empty.txt --output t.json", "inputs: found no text, wanted one"),
    ("train_tokenizer.py", "blank.txt --output t.json", "inputs: found no text, wanted one"),
    ("train_tokenizer.py", "no --output t.json", f"inputs: found no, {NO_FILE}"),
    ("train_tokenizer.py", "text.txt --output folder", "--output: found the folder folder"),
    ("train_tokenizer.py", "text.txt --output text.txt/t.json", "--output: found text.txt/t.json"),
    ("train_tokenizer.py", "text.txt --output t --vocab-size nan", "--vocab-size: found nan"),
    ("train_tokenizer.py", f"text.txt --output t --vocab-size {10**30}", "--vocab-size: found 1"),
    ("plot_loss.py", "no", f"logs: found no, {NO_FILE}"),
    ("plot_loss.py", "folder", "logs: found the folder folder, wanted a file"),
    ("plot_loss.py", "empty.txt", "logs: found the empty file empty.txt, wanted a file"),
    ("plot_loss.py", "text.txt", "text.txt: holds no training losses"),
    ("plot_loss.py", "loss.log", "loss.log:1: found no numbers, wanted a loss"),
    ("plot_loss.py", "loss.log --output x.abc", r"--output: found x.abc, wanted .* one of .*\.png"),
    ("plot_loss.py", "loss.log --labels a b", "--labels: found 2, wanted 1"),
    ("evaluation_table.py", "no", f"results: found no, {NO_FILE}"),
    ("evaluation_table.py", "folder", "folder: no results of lm_eval"),
    ("evaluation_table.py", "junk.json", "junk.json: no results of lm_eval"),
    ("evaluation_table.py", "results.json", "results.json: no results of lm_eval"),
    ("train_hf.py", "no.yml", "no.yml: .*"),
    ("train_hf.py", "list.yml", "list.yml: .*"),
    ("train_hf.py", "-d no model", "no/model.yml: .*|no/model: .*"),
    ("train_hf.py", "little.yml --output text.txt", "--output: found text.txt, wanted a folder"),
    ("train_hf.py", "little.yml --output text.txt/x", "--output: found text.txt/x, wanted"),
    ("quickstart.py", "--frish", "unrecognized arguments: --frish"),
    ("chat.py", "folder", "folder: found folder .*, wanted a MetaLA model"),
    ("chat.py", "folder --max-new-tokens 0", "--max-new-tokens: found 0, wanted a whole number"),
    ("chat.py", "folder --temperature nan", "--temperature: found nan, wanted a number"),
    ("chat.py", "folder --temperature -1", "--temperature: found -1, wanted a number"),
    ("chat.py", "folder --top-p 0", "--top-p: found 0, wanted a number above 0, at most 1"),
    ("chat.py", "folder --seed -1", "--seed: found -1, wanted a whole number from 0"),
    ("chat.py", "folder --device junk", "--device: found junk, wanted a device"),
    ("chat.py", "folder --dtype int8", "--dtype: found int8, wanted one of auto, float32"),
    ("benchmark_ops.py", "--jobs 0", "unrecognized arguments: --jobs 0"),
    ("benchmark_ops.py", "--no-check", "unrecognized arguments: --no-check"),
    ("benchmark_ops.py", "--plot folder", "--plot: found the folder folder, wanted the name"),
    ("benchmark_ops.py", "--junk", "unrecognized arguments: --junk"),
    ("benchmark_decoding.py", "--sizes 7b", "--sizes: found 7b, wanted one of 1b, 380m, 3b, tiny"),
    ("benchmark_convolution.py", "--junk", "unrecognized arguments: --junk"),
    ("benchmark_swiglu.py", "junk", "unrecognized arguments: junk"),
    ("benchmark_generate.py", "--size 7b", "--size: found 7b, wanted one of 1b, 380m, 3b, tiny"),
    ("benchmark_generate.py", "--batches 1 0", "--batches: found 0, wanted a whole number from 1"),
    ("benchmark_generate.py", "--contexts x", "--contexts: found x, wanted a whole number from 1"),
    ("benchmark_generate.py", "--steps -3", "--steps: found -3, wanted a whole number from 1"),
    ("benchmark_generate.py", "--budget nan", "--budget: found nan, wanted a number of seconds"),
    ("benchmark_generate.py", "--budget -1", "--budget: found -1, wanted a number of seconds"),
    ("benchmark_generate.py", "--plot text.txt/x.png", "--plot: found text.txt/x.png, wanted"),
    ("benchmark_generate.py", "--device cuda:99", "--device: found cuda:99, wanted a device"),
    ("benchmark_generate.py", "--device meta", "--device: found meta, wanted a device"),
    ("benchmark_generate.py", "--decoding-graph x", "--decoding-graph: found x, wanted one of"),
    ("benchmark_parallel.py", "--gpus 99", "--gpus: found [0-9]+ GPUs on this machine, wanted 99"),
    ("benchmark_parallel.py", "--gpus 1", "--gpus: found 1, wanted a whole number from 2"),
    ("benchmark_lengths.py", "x.json --lengths 0", "--lengths: found 0, wanted a whole"),
    ("benchmark_training.py", "--config no.yml", f"--config: found no.yml, {NO_FILE}"),
    ("benchmark_training.py", "--config folder", "--config: found the folder folder, wanted"),
    ("benchmark_training.py", "--config list.yml", "list.yml: .*"),
    ("benchmark_training.py", "--config little.yml", "little.yml: found no seq_length, wanted"),
    ("benchmark_training.py", "--gpus 0", "--gpus: found 0, wanted a whole number from 1"),
    ("benchmark_training.py", "--tensor-parallel 0", "--tensor-parallel: found 0, wanted"),
    ("benchmark_training.py", "--tensor-parallel 2", "--gpus: found 1, wanted a multiple of"),
    ("benchmark_training.py", "--micro-batch -2", "--micro-batch: found -2, wanted a whole number"),
    ("benchmark_training.py", "--recompute all", "--recompute: found all, wanted "),
    ("benchmark_training.py", "--steps 19", "--steps: found 19, wanted a whole number from 20"),
    *(
        pytest.param(f"benchmark_{name}.py", "", "found no CUDA device, wanted one", marks=NO_GPU)
        for name in ("ops", "launches", "decoding", "convolution", "swiglu")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("script", "arguments", "message"), CASES)
def test_one_line_and_nothing_else(work, run_here, tokenizer_file, script, arguments, message):
    (work / "results.json").write_text(json.dumps({"results": {"piqa": 3}}))
    before = listing(work)
    code, written = run_here(script, arguments.replace("TOKENIZER", str(tokenizer_file)))
    assert code in (1, 2)
    assert re.fullmatch(f"{re.escape(script)}: ({message}.*)\n", written), written
    assert listing(work) == before


def test_every_script_is_among_them():
    others = {"link_neox.py", "benchmark_convert.py"}  # have tests of their own
    named = {getattr(case, "values", case)[0] for case in CASES}
    scripts = [*SCRIPTS.glob("*.py"), *SCRIPTS.glob("benchmarks/benchmark_*.py")]
    assert named == {path.name for path in scripts} - others


def test_a_folder_that_nothing_can_be_written_to(work, run_here, monkeypatch):
    """Root, who may run the tests, can write everywhere."""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "folder")
    code, written = run_here("train_tokenizer.py", "text.txt --output folder/new/t.json")
    assert code == 2 and "--output: found folder/new/t.json, wanted a file in a folder" in written
    assert listing(work / "folder") == []


def test_matplotlib_missing_is_told_before_the_work(work, run_here, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, written = run_here("plot_loss.py", "loss.log --output x.png")
    assert code == 2 and "--output: found x.png, wanted matplotlib to draw it with" in written


def test_terminated_a_script_leaves_nothing(work, tokenizer_file):
    """SIGTERM removes a half-written output, as Ctrl-C does."""
    (work / "pipe.jsonl").write_text(json.dumps({"text": "word " * 50}) + "\n")
    code = (
        "import os, signal, sys, megatron_patch.indexed_dataset as data\n"
        "from megatron_patch.commands.prepare_data import cli\n"
        "data.IndexedDatasetWriter.add_document = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.argv = ['prepare_data.py', 'pipe.jsonl', '--output', 'data', '--tokenizer', "
        f"{str(tokenizer_file)!r}]\n"
        "cli()"
    )
    before = listing(work)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert listing(work) == before


def test_evaluate_wants_a_models_folder(work):
    python = work / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    result = subprocess.run(
        [SCRIPTS / "evaluate.sh", "folder"],
        capture_output=True,
        text=True,
        env={"METALA_PYTHON": str(python), "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 2
    wanted = "evaluate.sh: FOLDER: found folder, wanted a model's folder, with a config.json\n"
    assert result.stderr == wanted
