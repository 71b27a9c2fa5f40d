"""train_hf.py trains, resumes, exports and verifies."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, pipeline

from convert.export_record import check_record
from megatron_patch.architecture import SettingsError
from megatron_patch.commands.train_hf import TOLERANCE, largest_difference, save
from megatron_patch.hf import MetaLAForCausalLM
from megatron_patch.indexed_dataset import IndexedDatasetWriter
from megatron_patch.trainer.model import build_model, load_tokenizer, model_config
from megatron_patch.trainer.schedule import Schedule
from megatron_patch.trainer.settings import read_settings
from megatron_patch.trainer.training import (
    parameter_groups,
    read_metrics,
    wandb_run,
    wandb_wanted,
)


def losses_of(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return {row["iteration"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture
def run_train_hf(monkeypatch, run_command):
    """Function: runs train_hf.py in this process; returns what `run_command` does."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(*arguments):
        AcceleratorState._reset_state(True)  # else the Trainer keeps the last one's precision
        return run_command("train_hf.py", *arguments)

    return run


@pytest.fixture
def train_hf(run_train_hf):
    """Function: runs train_hf.py, which has to succeed; returns its output."""

    def train(*arguments):
        result = run_train_hf(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return train


def test_trains_saves_and_verifies(small_run, train_hf, run_script, tmp_path):
    result = run_script("train_hf.py", small_run(), "--verify")
    assert result.returncode == 0, result.stderr
    output = result.stdout
    assert "Settings without a meaning in the Hugging Face Trainer: distributed_backend" in output
    difference = float(output.split("Largest logit difference after reloading: ")[1].split()[0])
    assert difference <= 1e-4

    losses = losses_of(tmp_path / "run")
    assert list(losses) == list(range(1, 17))
    assert losses[1] == pytest.approx(math.log(512), abs=0.4)
    assert losses[16] < 0.8 * losses[1]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in rows if "eval_loss" in row] == [8, 16, 16]

    model = MetaLAForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    assert model.config.use_cache
    files = list((tmp_path / "run" / "hf").iterdir())
    assert check_record(tmp_path / "run" / "hf") == len(files) - 1
    assert model.config.eos_token_id == 0 and model.config.pad_token_id == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    assert len(tokenizer) == model.config.vocab_size == 512 and tokenizer.padding_side == "left"
    assert tokenizer.decode(tokenizer("def f(x):")["input_ids"]) == "def f(x):"
    # So that transformers 4 and 5 read each other's, and 4's `generate` takes what it returns.
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    kept = json.loads((tmp_path / "run/hf/tokenizer_config.json").read_text())
    assert kept["tokenizer_class"] == "PreTrainedTokenizerFast"
    in_checkpoint = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint-16")
    assert in_checkpoint("def f(x):") == tokenizer("def f(x):")

    (written,) = pipeline("text-generation", str(tmp_path / "run" / "hf"))(
        "def f", max_new_tokens=2
    )
    assert written["generated_text"].startswith("def f")

    assert "training is already complete" in train_hf(small_run())
    assert losses_of(tmp_path / "run") == losses


def test_a_stopped_run_goes_on_as_if_it_had_not_been(small_run, train_hf, tmp_path):
    train_hf(small_run("unbroken"))
    unbroken = losses_of(tmp_path / "unbroken")

    config = small_run("stopped")
    train_hf(config)
    stopped = tmp_path / "stopped"
    # The run was killed at iteration 11, while it wrote a line.
    shutil.rmtree(stopped / "checkpoint-16")
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["iteration"] <= 11]
    (stopped / "metrics.jsonl").write_text("".join(kept) + '{"iteration": 12, "lo')
    assert f"going on from {stopped / 'checkpoint-8'}" in train_hf(config)

    resumed = losses_of(stopped)
    assert list(resumed) == list(unbroken)
    for iteration, loss in resumed.items():
        assert loss == pytest.approx(unbroken[iteration], abs=1e-6), iteration


@pytest.fixture
def half_done(small_run, train_hf, run_train_hf, tmp_path):
    """Function: goes on, with changed settings, where eight iterations of sixteen are done."""
    whole = {"lr_decay_iters": 16, "keep_last_n_checkpoints": 1}
    train_hf(small_run(**whole, train_iters=8))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-8"]
    return lambda **changes: run_train_hf(small_run(**{**whole, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_iters": 7}, "train_iters: found 7, wanted at least 8, the iterations that"),
        ({"lr_decay_iters": 20}, "warmup_iters: found 2.0, wanted 1.6 as in .*checkpoint-8; overr"),
        ({"min_lr": 0.0}, "min_lr: found 0.0, wanted 0.001 as in .*override_lr_scheduler: true"),
        ({"lr_decay_style": "linear"}, "lr_decay_style: found 'linear', wanted 'cosine' as in"),
        ({"optimizer": {"params": {"lr": 0.02, "betas": [0.9, 0.95]}}}, "lr: found 0.02, wanted "),
        ({"optimizer": {"params": {"lr": 0.01}}}, r"optimizer.params.betas: found \(0.9, 0.999\)"),
        ({"weight_decay": 0.0}, "weight_decay: found 0.0, wanted 0.1 as in .*checkpoint-8"),
        (
            {"num_layers": 1, "attention_config": [[["metala"], 1]]},
            "load: found decoder_layers 2 in .* 1 ",
        ),
        ({"metala": {"tau": 8}}, "load: found tau 16.0 in .*checkpoint-8, wanted 8.0 as the set"),
    ],
)
def test_a_resumed_run_may_not_change(half_done, changes, message):
    result = half_done(**changes)
    assert result.returncode == 1
    assert re.match(f"train_hf.py: {message}", result.stderr.splitlines()[-1]), result.stderr


@pytest.mark.parametrize("line", ['{"step": 1, "loss": 2.0}', '{"iteration": "one"}', "[1]", "{"])
def test_metrics_of_others_are_not_written_over(small_run, run_train_hf, tmp_path, line):
    folder = tmp_path / "run"
    folder.mkdir()
    text = f'{line}x\n{{"iteration": 1, "loss": 2.0}}\n' if line == "{" else f"{line}\n"
    (folder / "metrics.jsonl").write_text(text)
    result = run_train_hf(small_run())
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("train_hf.py: save: found '") and str(folder / "metrics.jsonl") in last
    assert (folder / "metrics.jsonl").read_text() == text


def test_a_damaged_checkpoint_is_named(small_run, train_hf, run_train_hf, tmp_path):
    train_hf(small_run(train_iters=8, lr_decay_iters=16))
    checkpoint = tmp_path / "run" / "checkpoint-8"
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    for name in "config.json model.safetensors optimizer.pt scheduler.pt rng_state.pth".split():
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: len(whole) // 2])
        result = run_train_hf(small_run())
        assert result.returncode == 1
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f"train_hf.py: load: found {checkpoint} damaged ("), (name, last)
        (checkpoint / name).write_bytes(whole)
        assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(metrics)
    assert max(losses_of(tmp_path / "run")) == 8
    train_hf(small_run())


@pytest.mark.parametrize("key", ["override_lr_scheduler", "use_checkpoint_lr_scheduler"])
def test_a_changed_schedule_on_request(small_run, half_done, tmp_path, key):
    """`override_lr_scheduler` takes this run's schedule, the other setting the checkpoint's."""
    changes = {"min_lr": 5e-3, "optimizer": {"params": {"lr": 2e-2, "betas": [0.9, 0.95]}}}
    assert half_done(**changes, **{key: True}).returncode == 0
    which = changes if key.startswith("override") else {}
    schedule = Schedule.from_settings(read_settings([small_run(lr_decay_iters=16, **which)])[0])
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rates = {row["iteration"]: row["learning_rate"] for row in rows if "loss" in row}
    for step in range(9, 17):
        assert rates[step] == pytest.approx(schedule.lr * schedule(step - 1), rel=1e-9)


def test_a_resumed_run_has_its_own_batches_and_intervals(small_run, train_hf, half_done, tmp_path):
    changes = {"log_interval": 2, "eval_interval": 3, "checkpoint_factor": 5}
    result = half_done(
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=2,
        keep_last_n_checkpoints=None,
        **changes,
    )
    assert result.returncode == 0, result.stderr
    saved = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert saved == ["checkpoint-10", "checkpoint-15", "checkpoint-16", "checkpoint-8"]
    train_hf(small_run("unbroken", lr_decay_iters=16, **changes))
    for key in ("loss", "eval_loss"):
        resumed, unbroken = (
            [
                (row["iteration"], row[key])
                for row in read_metrics(tmp_path / run / "metrics.jsonl")
                if key in row and row["iteration"] > 8
            ]
            for run in ("run", "unbroken")
        )
        assert [step for step, _ in resumed] == [step for step, _ in unbroken]
        for (_, a), (_, b) in zip(resumed, unbroken, strict=True):
            assert a == pytest.approx(b, abs=1e-4)  # transformers 4 rounds


def test_evaluation_without_iterations_or_beyond_the_end(small_run, train_hf, tmp_path):
    train_hf(small_run("none", eval_iters=0, train_iters=2))
    rows = read_metrics(tmp_path / "none" / "metrics.jsonl")
    assert not [row for row in rows if "eval_loss" in row]
    train_hf(small_run("beyond", eval_interval=1000, train_iters=2))
    rows = read_metrics(tmp_path / "beyond" / "metrics.jsonl")
    assert [row["iteration"] for row in rows if "eval_loss" in row] == [2]


def test_data_of_another_tokenizer_end_the_run(small_run, run_train_hf, tmp_path):
    for name, token in (("same", 511), ("other", 512)):
        with IndexedDatasetWriter(tmp_path / name, vocab_size=1000) as writer:
            for _ in range(8):
                writer.add_document([1, 2, token] * 100)
        data = {"data_path": str(tmp_path / name), "split": "1,0,0"}
        result = run_train_hf(small_run(name, **data, train_iters=2))
        if name == "same":
            assert result.returncode == 0, result.stderr
    assert result.returncode == 1
    assert "vocab_file: found the token 512 in the data, wanted one below 512" in result.stderr


def test_a_loss_that_is_none_is_logged(small_run, train_hf, tmp_path, monkeypatch):
    """By default the Trainer logs the mean of other losses instead."""
    monkeypatch.setattr(
        "torch.nn.functional.cross_entropy", lambda logits, labels: logits.sum() * math.nan
    )
    train_hf(small_run(train_iters=2, eval_iters=0))
    assert all(math.isnan(loss) for loss in losses_of(tmp_path / "run").values())


def test_a_warm_up_of_less_than_a_step_is_told(small_run, train_hf):
    output = train_hf(small_run(train_iters=2, warmup=0.1, eval_iters=0))
    assert "MetaLA: warmup: 0.1 of 2 iterations is less than one" in output
    assert "the first learning rate 5 times lr" in output


def test_rows_that_gpt_neox_would_add_are_told(small_run, train_hf):
    one_step = {"train_iters": 1, "warmup": 0.0, "eval_iters": 0}
    assert "make_vocab" not in train_hf(small_run("even", **one_step))
    output = train_hf(small_run("odd", make_vocab_size_divisible_by=500, **one_step))
    assert "512 tokens stay so many; GPT-NeoX would add 488 rows, which count in its loss" in output


def test_accumulation_is_one_large_batch(small_run, train_hf, tmp_path):
    small = {"train_iters": 3, "eval_iters": 0, "checkpoint_factor": None}
    train_hf(small_run("large", **small))
    train_hf(
        small_run(
            "accumulated", train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2, **small
        )
    )
    large = read_metrics(tmp_path / "large" / "metrics.jsonl")
    accumulated = read_metrics(tmp_path / "accumulated" / "metrics.jsonl")
    for a, b in zip(large, accumulated, strict=True):
        # 1e-4: transformers 4 rounds the logged loss
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_other_options_train(small_run, train_hf, tmp_path):
    config = small_run(
        train_iters=2,
        precision="bfloat16",
        zero_optimization={"stage": 1},
        norm="rmsnorm",
        no_weight_tying=None,
        checkpoint_activations=True,
        metala={"self_augmentation": False, "init": "neox"},
    )
    train_hf(config, "--output", tmp_path / "elsewhere", "--verify")
    model = MetaLAForCausalLM.from_pretrained(tmp_path / "elsewhere")
    assert model.config.norm_type == "rmsnorm" and model.config.tie_word_embeddings


def test_refusals_are_one_line(small_run, run_train_hf):
    result = run_train_hf(small_run(model_parallel_size=2))
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "train_hf.py: model_parallel_size: found 2, wanted 0 or 1 with the Hugging Face Trainer"
    )
    assert "Traceback" not in result.stderr


def test_offline_wandb_leaves_a_run(small_run, run_script, tmp_path):
    pytest.importorskip("wandb")
    config = small_run(train_iters=2, eval_iters=0, use_wandb=True, wandb_project="metala-test")
    result = run_script("train_hf.py", config, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("run-*.wandb"))


def test_wandb_is_used_with_a_key_or_offline(small_run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    names = ("MODE", "API_KEY", "LOCAL", "PROJECT", "BASE_URL", "RUN_GROUP", "ENTITY")
    for name in names:
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that monkeypatch restores it
        monkeypatch.delenv(f"WANDB_{name}")
    monkeypatch.setenv("HOME", str(tmp_path))
    settings, _ = read_settings([small_run(use_wandb=True, wandb_project="p", wandb_team="t")])
    assert not wandb_wanted(settings)
    assert "no API key found" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_RUN_GROUP", "of the caller")
    with wandb_run(settings) as is_wanted:
        assert is_wanted
        found = [os.environ[f"WANDB_{name}"] for name in ("PROJECT", "ENTITY", "RUN_GROUP")]
        assert found == ["p", "t", "of the caller"]
    assert "WANDB_PROJECT" not in os.environ and "WANDB_ENTITY" not in os.environ
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not wandb_wanted(settings)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_wanted(settings)
    assert not wandb_wanted(read_settings([small_run(use_wandb=False)])[0])


@pytest.mark.parametrize("style", ["cosine", "linear", "exponential", "constant"])
def test_learning_rate(small_run, style):
    settings, _ = read_settings([small_run(lr_decay_style=style, train_iters=100, warmup=0.1)])
    schedule = Schedule.from_settings(settings)
    factors = [schedule(step) for step in range(101)]
    assert factors[0] == factors[1] == 0.1  # GPT-NeoX's first two steps
    assert factors[10] == 1.0
    last = {"cosine": 0.1, "linear": 0.1, "exponential": math.exp(-0.693), "constant": 1.0}
    assert factors[100] == pytest.approx(last[style])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    half = {"cosine": 0.55, "linear": 0.5, "exponential": math.exp(-0.3465), "constant": 1.0}
    assert factors[55] == pytest.approx(half[style])


def test_end_of_text_pads_where_there_is_no_padding_token(tmp_path):
    """And begins a text, whatever else the tokenizer could take for that."""
    words = {"<|endoftext|>": 0, "<s>": 1, "a": 2}
    file = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(file))
    found = load_tokenizer(SimpleNamespace(vocab_file=file))
    assert found.size == 3 and set(found.special.values()) == {0}
    Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a")).save(str(file))
    with pytest.raises(SettingsError, match=r"has no token <\|endoftext\|>$"):
        load_tokenizer(SimpleNamespace(vocab_file=file))
    with pytest.raises(SettingsError, match="^vocab_file: "):
        load_tokenizer(SimpleNamespace(vocab_file=tmp_path))


def test_weight_decay_skips_biases_norms_and_aug_balance(small_run):
    settings, _ = read_settings([small_run(norm="rmsnorm")])
    model = build_model(settings, model_config(settings, load_tokenizer(settings)))
    decayed, free = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].removeprefix("model.layers.0.") for p in free["params"][:4]} == {
        "channel_norm.weight",
        "token_mixer.aug_balance",
        "token_mixer.g_proj.bias",
        "token_norm.weight",
    }
    assert names[id(free["params"][-1])] == "model.final_norm.weight"
    assert len(free["params"]) == 2 * 4 + 1
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0


def test_initialisation_as_neox(small_run):
    def stds(**changes):
        settings, _ = read_settings([small_run(**changes)])
        model = build_model(settings, model_config(settings, load_tokenizer(settings)))
        mixer = model.model.layers[0].token_mixer
        return [w.weight.std().item() for w in (mixer.q_proj, mixer.out_proj)]

    assert stds(metala={"init": "neox"}) == pytest.approx([0.02, 0.01], rel=0.1)
    assert stds(metala={"init": "neox"}, output_layer_init_method="normal") == pytest.approx(
        [0.02, 0.02], rel=0.1
    )
    xavier = 2**-2.5 * math.sqrt(2 / (64 + 32))
    assert stds(metala={"init": "authors"}) == pytest.approx([xavier, 0.02], rel=0.1)


def test_a_folder_with_something_else_is_not_written_over(small_run, run_train_hf, tmp_path):
    output = tmp_path / "mine"
    output.mkdir()
    (output / "config.json").write_text("{}")
    result = run_train_hf(small_run(), "--output", output)
    assert result.returncode == 1 and "nothing that this command wrote" in result.stderr
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert not (tmp_path / "run").exists(), "it trained first"


def test_a_verification_that_fails_leaves_the_folder_of_before(
    small_run, run_train_hf, train_hf, tmp_path, monkeypatch
):
    train_hf(small_run(train_iters=2, lr_decay_iters=16))
    before = (tmp_path / "run" / "hf" / "SHA256SUMS").read_text()
    monkeypatch.setattr("megatron_patch.commands.train_hf.TOLERANCE", -1.0)
    for folder in ("hf", "new"):
        result = run_train_hf(
            small_run(train_iters=3, lr_decay_iters=16),
            "--verify", "--output", tmp_path / "run" / folder,
        )  # fmt: skip
        assert result.returncode == 1 and "wanted at most -1e+00" in result.stderr
    assert (tmp_path / "run" / "hf" / "SHA256SUMS").read_text() == before
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith((".", "new"))]


def test_verification_finds_a_changed_weight(small_run, tmp_path):
    settings, _ = read_settings([small_run()])
    model = build_model(settings, model_config(settings, load_tokenizer(settings)))
    (tmp_path / "hf").mkdir()
    save(model, settings, tmp_path / "hf")
    tokens = torch.arange(20)[None]
    assert largest_difference(model, tmp_path / "hf", tokens) <= TOLERANCE
    with torch.no_grad():
        model.model.layers[1].channel_mixer.l2.weight[3, 5] += 0.1
    assert largest_difference(model, tmp_path / "hf", tokens) > TOLERANCE
