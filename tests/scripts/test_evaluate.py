"""lm_eval on model folders, against likelihoods and texts computed here, and the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from evaluation_table import PUBLISHED, PUBLISHED_AVERAGE, newest_results, read_results, table
from transformers import PreTrainedTokenizerFast

from megatron_patch.hf.remote_code import write_model_code

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = [
    ("def read(", ["self", "return import class", "None"], 0),
    ("import", [" os", " the whole of it", " sys"], 1),
    ("for name in names", [":", " in", " is not"], 2),
    ("return", [" self", " None", " True"], 1),
    ("class A longer name", ["(object):", ":", " pass"], 0),
]
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="lm_eval is not installed here: scripts/test.sh runs its tests apart",
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>", pad_token="<|padding|>"
    )


@pytest.fixture
def prepared(model, tokenizer, tmp_path):
    """A folder with a model, its code, and two tasks with their data."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_model_code(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "tasks/data.jsonl"
    keys = ("question", "choices", "answer")
    data.write_text("".join(json.dumps(dict(zip(keys, q, strict=True))) + "\n" for q in QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choosing = {
        **common,
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True}
            for m in ("acc", "acc_norm")
        ],
    }
    writing = {
        **common,
        "task": "tiny_text",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["</never>"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choosing, writing):
        (tmp_path / f"tasks/{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def run(command, folder, **environment):
    result = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": str(folder / "home"),
            "HF_DATASETS_OFFLINE": "1",
            "HF_HUB_OFFLINE": "1",
            "METALA_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def log_likelihood(model, tokenizer, question, choice):
    """Returns the log-likelihood of the choice's tokens after the question's."""
    context = tokenizer(question)["input_ids"]
    ids = torch.tensor([tokenizer(question + choice)["input_ids"]])
    with torch.no_grad():
        scores = model(ids).logits[0].log_softmax(-1)
    positions = range(len(context), ids.shape[1])
    return sum(scores[p - 1, ids[0, p]].item() for p in positions)


@needs_lm_eval
def test_lm_eval_on_a_folder_with_its_code(prepared, model, tokenizer):
    run(
        [sys.executable, "-m", "lm_eval", "--model=hf", "--device=cpu",
         "--model_args=pretrained=model,trust_remote_code=True,dtype=float32",
         "--tasks=tiny_choice,tiny_text", "--include_path=tasks", "--log_samples",
         "--batch_size=4", "--output_path=out"],
        prepared,
    )  # fmt: skip
    (results,) = (prepared / "out").rglob("results*.json")
    values = json.loads(results.read_text())["results"]
    (chosen,) = (prepared / "out").rglob("samples_tiny_choice*.jsonl")
    samples = {s["doc_id"]: s for s in map(json.loads, chosen.read_text().splitlines())}
    right = right_by_length = 0
    for number, (question, choices, answer) in enumerate(QUESTIONS):
        wanted = [log_likelihood(model, tokenizer, question, choice) for choice in choices]
        found = [float(response[0][0]) for response in samples[number]["resps"]]
        assert found == pytest.approx(wanted, abs=1e-4)
        by_length = [x / len(choice) for x, choice in zip(wanted, choices, strict=True)]
        right += max(range(3), key=wanted.__getitem__) == answer
        right_by_length += max(range(3), key=by_length.__getitem__) == answer
    assert values["tiny_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert values["tiny_choice"]["acc_norm,none"] == pytest.approx(right_by_length / len(QUESTIONS))

    (written,) = (prepared / "out").rglob("samples_tiny_text*.jsonl")
    for sample in map(json.loads, written.read_text().splitlines()):
        ids = tokenizer(QUESTIONS[sample["doc_id"]][0], return_tensors="pt")["input_ids"]
        text = tokenizer.decode(
            model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :],
            skip_special_tokens=True,
        )
        assert sample["resps"][0][0] == text


@needs_lm_eval
def test_evaluate_script(prepared):
    """evaluate.sh uses this package's classes, so the folder needs no code."""
    for file in (prepared / "model").glob("*.py"):
        file.unlink()
    out = run(
        [ROOT / "scripts/evaluate.sh", "model", "--include_path=tasks", "--device=cpu",
         "--batch_size=2"],
        prepared,
        TASKS="tiny_choice",
    )  # fmt: skip
    last = out[out.index("task ") :]
    assert "tiny_choice" in last and "60.09" in last
    assert len(list((prepared / "runs/evaluate/model").rglob("results*.json"))) == 1


def test_evaluate_script_says_what_is_missing(tmp_path):
    script = ROOT / "scripts/evaluate.sh"
    for given, found in (([], "none"), ([tmp_path], tmp_path), (["--limit"], "--limit")):
        wrong = subprocess.run([script, *given], capture_output=True, text=True)
        line = f"evaluate.sh: FOLDER: found {found}, wanted a model's folder, with a config.json\n"
        assert wrong.returncode == 2 and wrong.stderr == line
    (tmp_path / "config.json").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    result = subprocess.run(
        [script, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "METALA_PYTHON": str(python), "PYTHONPATH": ""},
    )
    assert result.returncode == 1 and "lm_eval is not installed" in result.stderr


def test_evaluate_script_shows_the_results_it_wrote(tmp_path):
    """Not those of an earlier evaluation, which lie in the usual place."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").touch()
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval/__init__.py").touch()
    (tmp_path / "lm_eval/__main__.py").write_text(
        "import argparse, json, pathlib, os\n"
        "def cli_evaluate():\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('-o', '--output_path')\n"
        "    folder = pathlib.Path(parser.parse_known_args()[0].output_path)\n"
        "    folder.mkdir(parents=True, exist_ok=True)\n"
        "    results = {'results': {'task': {'acc,none': float(os.environ['ACC'])}}}\n"
        "    (folder / 'results.json').write_text(json.dumps(results))\n"
    )
    for accuracy, folder, more in (
        ("0.25", "model", []),
        ("0.75", "mine", ["--output_path", "mine"]),
    ):
        # From inside the folder too: its name is not "."
        out = run(
            [ROOT / "scripts/evaluate.sh", ".", *more],
            tmp_path / "model",
            ACC=accuracy,
            PYTHONPATH=str(tmp_path),
        )
        assert f"{float(accuracy) * 100:.2f}" in out
        assert list((tmp_path / "model").rglob(f"{folder}/results.json"))


def test_table(tmp_path):
    for size, average in enumerate(PUBLISHED_AVERAGE):  # no typing error in the table
        assert sum(row[size] for row in PUBLISHED.values()) / 7 == pytest.approx(average, abs=0.011)

    values = {task: {"alias": task, "acc,none": 0.5, "acc_stderr,none": 0.1} for task in PUBLISHED}
    values["hellaswag"]["acc_norm,none"] = 0.64
    values["lambada"] = {"perplexity,none": 10.0}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/results_1.json").write_text(json.dumps({"results": {}}))
    os.utime(tmp_path / "model/results_1.json", (0, 0))
    (tmp_path / "model/results_0.json").write_text(json.dumps({"results": values}))
    lines = table(read_results(newest_results(tmp_path))).splitlines()
    assert lines[0].split()[:3] == ["task", "acc", "acc_norm"]
    assert lines[1].split() == ["boolq", "50.00", "-", "60.09", "59.05", "62.84"]
    assert lines[3].split() == ["hellaswag", "50.00", "64.00", "38.51", "46.43", "59.25"]
    assert lines[-1].split() == ["average", "50.00", "52.00", "46.45", "49.52", "55.52"]
    assert len({len(line) for line in lines}) == 1 and "lambada" not in "".join(lines)
    del values["piqa"]
    (tmp_path / "model/results_0.json").write_text(json.dumps({"results": values}))
    text = table(read_results(newest_results(tmp_path)))
    assert "average" not in text and text.splitlines()[2].split()[:3] == ["piqa", "-", "-"]

    with pytest.raises(FileNotFoundError, match="no results of lm_eval"):
        newest_results(tmp_path / "nothing")
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="no results of lm_eval"):
        read_results(tmp_path / "results.json")
