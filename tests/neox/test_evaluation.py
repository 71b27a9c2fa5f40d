"""GPT-NeoX's eval.py on MetaLA models: lm_eval's numbers against those that the converted model
gives here. scripts/test.sh runs this where lm_eval is."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from convert import reshape_neox
from tests.neox.conversion import convert, export
from tests.neox.training import Run, neox, settings, train

pytestmark = pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="lm_eval is not installed here: scripts/test.sh runs its tests apart",
)

# Twelve questions: GPT-NeoX's own adapter reads ten. Two are longer than 64 tokens.
QUESTIONS = [
    f"{'name ' * length}{word}"
    for length in (0, 3, 70)
    for word in ("def read(", "import", "class A:", "return self.")
]
CHOICES = [" None", " self", "(object):", " os"]
HYBRID = {
    "init_method": "normal",
    "init_method_std": 0.2,
    "num_layers": 3,
    "attention_config": [[["metala", "global", "metala"], 1]],
    "pos_emb": "rotary",
    "use_bias_in_attn_linear": False,
    "train_iters": 4,
    "eval_interval": 3,
    "checkpoint_factor": 4,
}
NEW_TOKENS, STOP = 6, "e"


@pytest.fixture(scope="module")
def trained(neox_checkout, token_data, tokenizer_file, tmp_path_factory) -> tuple[Run, Path]:
    """A hybrid after four steps in two pipeline stages, and its checkpoint in `pipeline`, on one
    rank in `one`, on two tensor-parallel ranks in `tensor`, and converted in `hf`."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = settings(token_data, tokenizer_file, pp=2, save=str(folder / "pipeline"), **HYBRID)
    run = train(neox_checkout, config, folder)
    for name, tp in (("one", 1), ("tensor", 2)):
        convert(
            reshape_neox, neox_checkout, "--checkpoint", folder / "pipeline",
            "--output", folder / name, "--tensor-parallel", tp, "--pipeline-parallel", 0,
        )  # fmt: skip
    export(neox_checkout, folder / "pipeline", folder / "hf")
    return run, folder


@pytest.fixture(scope="module")
def expected(trained) -> tuple[dict[str, float], list[str]]:
    """The metrics by task, computed from the converted model, and the texts that it writes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import megatron_patch.hf  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(trained[1] / "hf")
    model = AutoModelForCausalLM.from_pretrained(trained[1] / "hf").eval()

    def likelihood(context: list[int], continuation: list[int]) -> float:
        whole = (context + continuation)[-65:]
        with torch.no_grad():
            scores = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
        of_tokens = scores.gather(1, torch.tensor(whole[1:])[:, None])
        return of_tokens[-len(continuation) :].sum().item()

    def text(question: str) -> str:
        ids = tokenizer(question)["input_ids"][NEW_TOKENS - 64 :]
        whole = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
        return tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True).split(STOP)[0]

    def rolling(question: str) -> float:
        ids, total = tokenizer(question)["input_ids"], 0.0
        before = [tokenizer.eos_token_id]
        if len(ids) > 64:  # the last window reaches back to have 64 tokens
            total += likelihood(before, ids[:64])
            before, ids = ids[len(ids) - 65 : 64], ids[64:]
        return total + likelihood(before, ids)

    best, by_choice = 0, []
    for number, question in enumerate(QUESTIONS):
        context = tokenizer(question)["input_ids"]
        scores = []
        for choice in CHOICES:
            whole = tokenizer(question + choice)["input_ids"]
            scores.append(likelihood(context, whole[len(context) :]))
        best += max(range(4), key=scores.__getitem__) == number % 4
        by_choice.append(scores[number % 4])
    total = sum(map(rolling, QUESTIONS))
    metrics = {
        "tiny_choice_acc,none": best / 12,
        "tiny_last_perplexity,none": math.exp(-sum(by_choice) / 12),
        "tiny_rolling_byte_perplexity,none": math.exp(-total / sum(map(len, QUESTIONS))),
        "tiny_text_exact_match,none": 0.5,
    }
    return metrics, [text(question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def tasks(expected, tmp_path_factory) -> list[str]:
    """YAML files of four tasks of all kinds. The converted model writes half of the texts."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [t if i % 2 else t + "?" for i, t in enumerate(expected[1])]
    data = [
        {"question": q, "choices": CHOICES, "answer": i % 4, "last": CHOICES[i % 4], "text": t}
        for i, (q, t) in enumerate(zip(QUESTIONS, texts, strict=True))
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in data))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }

    def task(kind: str, metric: str, target: str, **more) -> dict:
        metrics = [{"metric": metric}]
        return {
            "output_type": kind,
            "doc_to_target": target,
            "metric_list": metrics,
            **common,
            **more,
        }

    generation = {"until": STOP, "max_gen_toks": NEW_TOKENS, "do_sample": False}
    found = {
        "tiny_choice": task("multiple_choice", "acc", "answer", doc_to_choice="choices"),
        "tiny_last": task("loglikelihood", "perplexity", "{{last}}"),
        "tiny_rolling": task(
            "loglikelihood_rolling", "byte_perplexity", "{{question}}", doc_to_text=""
        ),
        "tiny_text": task(
            "generate_until", "exact_match", "{{text}}", generation_kwargs=generation
        ),
    }
    for name, content in found.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{yaml.safe_dump(content)}")
    return [str(folder / f"{name}.yaml") for name in found]


def environment(folder: Path) -> dict[str, str]:
    # lm_eval's packages lie in PYTHONPATH, which the fork server hands on
    return {"HF_HOME": str(folder), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    ("name", "tp", "pp"), [("one", 1, 0), ("tensor", 2, 0), ("pipeline", 1, 2)]
)
def test_eval_gives_the_numbers_of_the_converted_model(
    neox_checkout, token_data, tokenizer_file, trained, expected, tasks, tmp_path, name, tp, pp
):
    """Of every kind of task; the first on two data-parallel ranks."""
    changes = {**HYBRID, "load": str(trained[1] / name), "num_gpus": 2, "finetune": True}
    config = settings(token_data, tokenizer_file, tp, pp, eval_tasks=tasks, **changes)
    config |= {"eval_results_prefix": str(tmp_path / "found"), "train_micro_batch_size_per_gpu": 3}
    run = neox(neox_checkout, "eval.py", config, tmp_path, **environment(tmp_path / "home"))
    assert run.returncode == 0, run.output[-6000:]
    assert "MetaLA: eval_tasks run whole, by lm_eval" in run.output
    (file,) = tmp_path.glob("found_eval_results_*.json")
    results = json.loads(file.read_text())["results"]
    for key, value in expected[0].items():
        task = "_".join(key.split("_")[:2])
        assert results[task][key.removeprefix(f"{task}_")] == pytest.approx(value, rel=1e-4), key


def test_a_training_evaluates_and_goes_on_as_without(
    neox_checkout, token_data, tokenizer_file, trained, expected, tasks, tmp_path
):
    config = settings(token_data, tokenizer_file, pp=2, eval_tasks=tasks, **HYBRID)
    del config["checkpoint_factor"]
    run = train(neox_checkout, config, tmp_path, **environment(tmp_path / "home"))
    assert run.losses == trained[0].losses
    assert run.output.count("tiny_rolling_byte_perplexity,none value: ") >= 2
    line = run.output[run.output.rindex("tiny_rolling_byte_perplexity,none value: ") :]
    assert float(line.split("value: ")[1].split()[0]) == pytest.approx(
        expected[0]["tiny_rolling_byte_perplexity,none"], rel=1e-4
    )


def test_an_unknown_task_ends_eval_with_one_line(
    neox_checkout, token_data, tokenizer_file, trained, tmp_path
):
    changes = {**HYBRID, "load": str(trained[1] / "one"), "finetune": True, "num_gpus": 1}
    config = settings(token_data, tokenizer_file, eval_tasks=["no_such_task"], **changes)
    run = neox(neox_checkout, "eval.py", config, tmp_path, **environment(tmp_path / "home"))
    message = "MetaLA: eval_tasks: found 'no_such_task', wanted a task of lm_eval or its YAML file"
    assert run.returncode == 1 and message in run.output and "Traceback" not in run.output
