"""The numbers of a training by the Hugging Face Trainer, against a loop written out in float64 and
against GPT-NeoX itself."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import types

import numpy as np
import pytest
import torch
import transformers
import yaml
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_patch.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_patch.neox.upstream_fixes.training_loop import keep_after_the_end
from megatron_patch.trainer.model import build_model, load_tokenizer, model_config
from megatron_patch.trainer.samples import BlendedSamples, build_samples
from megatron_patch.trainer.schedule import Schedule
from megatron_patch.trainer.settings import read_settings
from megatron_patch.trainer.training import read_metrics, train

# transformers 4 logs the training loss with four decimals.
LOSS_TOLERANCE = 1e-6 if transformers.__version__ >= "5" else 5.1e-5


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # the settings win
    AcceleratorState._reset_state(True)  # else the Trainer keeps the last one's precision
    yield
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"  # training leaves it as it was


def run(config, dtype=torch.float32):
    """Trains a model of `dtype`; returns the rows it logs, its first weights, and the model."""
    read, _ = read_settings([config])
    model = build_model(read, model_config(read, load_tokenizer(read))).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_samples, validation = build_samples(read, 1)
    model = train(read, model, train_samples, validation, None)
    return read_metrics(read.save / "metrics.jsonl"), before, model


def stream_of_shuffled_documents(data, documents, pieces, seq_length):
    """Returns GPT-NeoX's training samples of one epoch, [pieces, seq_length + 1]."""
    random = np.random.RandomState(1234)
    order = documents.astype(np.int32)
    random.shuffle(order)
    stream = np.concatenate([data.get(d, 0, data.sizes[d]) for d in order])
    places = np.arange((len(stream) - 1) // seq_length)
    random.shuffle(places)
    places = places[:pieces, None] * seq_length + np.arange(seq_length + 1)
    return torch.from_numpy(stream.astype(np.int64)[places])


def loss_of(model, tokens):
    logits = model(tokens[:, :-1], use_cache=False).logits
    chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])
    return -chosen.mean()


def test_documents_of_a_sample_are_kept_apart(small_run, short_documents):
    """The loss of the first step is that of each document alone."""
    batch, length = 4, 32
    rows, before, model = run(
        small_run(
            data_path=str(short_documents),
            train_iters=1,
            eval_iters=0,
            init_method_std=0.1,
            metala={"reset_at_document": True},
        ),
        torch.float64,
    )
    model.load_state_dict(before)
    data = IndexedDataset(short_documents)
    samples = stream_of_shuffled_documents(data, np.arange(round(0.8 * len(data))), batch, length)
    alone, whole = [], []
    with torch.no_grad():
        for sample in samples:
            ends = [place + 1 for place in range(length) if sample[place] == 0]
            for start, end in zip([0, *ends], [*ends, length], strict=True):
                if start < end:
                    piece = sample[None, start : end + 1]
                    alone.append((end - start) * loss_of(model, piece).item())
            whole.append(loss_of(model, sample[None]).item())
    found = rows[0]["loss"]
    assert found == pytest.approx(sum(alone) / (batch * length), abs=LOSS_TOLERANCE)
    assert abs(found - np.mean(whole)) > 100 * LOSS_TOLERANCE


def adam_step(parameter, gradient, state, step, rate, decay):
    first, second = state.setdefault("m", 0), state.setdefault("v", 0)
    state["m"] = first = 0.9 * first + 0.1 * gradient
    state["v"] = second = 0.95 * second + 0.05 * gradient**2
    update = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    parameter.sub_(rate * (update + decay * parameter))


@pytest.mark.parametrize(
    ("micro", "accumulated", "clipping", "decay"), [(4, 1, 1.0, 0.1), (2, 3, 0.3, 0.0)]
)
def test_numbers_of_a_loop_in_float64(
    small_run, token_data, tmp_path, micro, accumulated, clipping, decay
):
    steps, length, peak, lowest = 6, 32, 1e-2, 1e-3
    rows, before, trained = run(
        small_run(
            norm="rmsnorm",
            train_iters=steps,
            eval_interval=2,
            warmup=0.5,
            train_micro_batch_size_per_gpu=micro,
            gradient_accumulation_steps=accumulated,
            gradient_clipping=clipping,
            weight_decay=decay,
        ),
        torch.float64,
    )
    model = type(trained)(trained.config).double()
    model.load_state_dict(before)
    states = {name: {} for name, _ in model.named_parameters()}
    batch, data = micro * accumulated, IndexedDataset(token_data)
    samples = stream_of_shuffled_documents(data, np.arange(51), steps * batch, length)
    held_out = stream_of_shuffled_documents(data, np.arange(51, 64), 4 * 2 * batch, length)
    wanted, evaluations = [], []

    def evaluate():
        taken = held_out[len(evaluations) * 2 * batch :][: 2 * batch]
        with torch.no_grad():
            evaluations.append(loss_of(model, taken).item())

    for step in range(1, steps + 1):
        loss = loss_of(model, samples[(step - 1) * batch :][:batch])
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
        done = step - 1
        if done <= 3:
            rate = peak * max(done, 1) / 3
        else:
            rate = lowest + (peak - lowest) / 2 * (1 + math.cos(math.pi * (done - 3) / 3))
        with torch.no_grad():
            for name, p in model.named_parameters():
                is_matrix = p.dim() > 1 and "aug_balance" not in name
                gradient = p.grad * min(1.0, clipping / norm)
                adam_step(p, gradient, states[name], step, rate, decay if is_matrix else 0.0)
                p.grad = None
        wanted.append((loss.item(), norm.item(), rate))
        if step % 2 == 0:
            evaluate()
    evaluate()

    logged = [row for row in rows if "loss" in row]
    for row, (loss, norm, rate) in zip(logged, wanted, strict=True):
        assert row["loss"] == pytest.approx(loss, abs=LOSS_TOLERANCE)
        assert row["learning_rate"] == pytest.approx(rate, rel=1e-12)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-6)
    evaluated = [(row["iteration"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    assert [iteration for iteration, _ in evaluated] == [2, 4, 6, 6]
    # The Trainer's cross entropy and the mean over its batches are in float32.
    rounding = 4 * torch.finfo(torch.float32).eps
    assert [loss for _, loss in evaluated] == pytest.approx(evaluations, rel=rounding)
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), p, rtol=0, atol=1e-5)


def test_ten_steps_are_gpt_neoxs(neox_checkout, small_run, token_data, tokenizer_file, tmp_path):
    """Both train the same model with blended data, accumulation, clipping, decay and validation."""
    from convert.hf_to_neox import hf_to_neox
    from tests.neox.training import settings as neox_settings
    from tests.neox.training import train as train_in_neox

    with IndexedDatasetWriter(tmp_path / "other", 512) as writer:
        for start in range(40):
            writer.add_document(np.arange(start, start + 300) * 3 % 512)
    paths = [str(token_data), str(tmp_path / "other")]
    config = neox_settings(
        token_data,
        tokenizer_file,
        train_iters=10,
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=2,
        train_data_paths=paths,
        train_data_weights=[0.3, 0.1],
        eval_interval=4,
        save=str(tmp_path / "trainer"),
        seq_length=32,
        lr_decay_iters=None,
        warmup=0.25,
    )
    del config["data_path"], config["lr_decay_iters"]
    for name in ("valid", "test"):
        config |= {f"{name}_data_paths": paths[::-1], f"{name}_data_weights": [0.7, 0.3]}
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(config))
    rows, before, model = run(file)
    model.load_state_dict(before)
    model.save_pretrained(tmp_path / "hf")
    load_tokenizer(read_settings([file])[0]).write(tmp_path / "hf")
    hf_to_neox(tmp_path / "hf", tmp_path / "imported", 1, 0, None, False)
    config |= {"load": str(tmp_path / "imported"), "finetune": True}
    config["save"] = None
    neox = train_in_neox(neox_checkout, config, tmp_path)
    # GPT-NeoX prints six decimals.
    losses = {row["iteration"]: row["loss"] for row in rows if "loss" in row}
    assert losses == pytest.approx(neox.losses, abs=LOSS_TOLERANCE + 1e-6)
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(evaluated) == 3  # after 4, 8 and all steps
    assert evaluated == pytest.approx(list(neox.validation_losses.values()), abs=2e-6)


@pytest.fixture(scope="module")
def annealing_lr(neox_checkout):
    """GPT-NeoX's class, loaded without the rest of GPT-NeoX."""
    spec = importlib.util.spec_from_file_location(
        "neox_learning_rates", neox_checkout / "megatron" / "learning_rates.py"
    )
    module = importlib.util.module_from_spec(spec)
    stand_in = types.ModuleType("megatron")
    stand_in.print_rank_0 = lambda *_: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "megatron", stand_in)
        spec.loader.exec_module(module)
    return module.AnnealingLR


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    style=st.sampled_from(["constant", "linear", "cosine", "exponential"]),
    iterations=st.integers(1, 40),
    decay_iters=st.integers(1, 40),
    warmup=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 0.95, 0.99, 1.0]),
    min_lr=st.sampled_from([0.0, 1e-4, 2e-2]),
)
def test_learning_rates_are_gpt_neoxs(annealing_lr, style, iterations, decay_iters, warmup, min_lr):
    assume(warmup < 1 or iterations <= decay_iters)
    schedule = Schedule(1e-2, min_lr, warmup * decay_iters, decay_iters, style)
    optimizer = types.SimpleNamespace(param_groups=[{}])
    neox = annealing_lr(optimizer, 1e-2, warmup * decay_iters, decay_iters, style, 0, min_lr)
    keep_after_the_end(neox)
    for step in range(iterations):
        assert 1e-2 * schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        neox.step()


@pytest.fixture(scope="module")
def data_helpers(neox_checkout):
    """GPT-NeoX's compiled helper."""
    (file,) = (neox_checkout / "megatron" / "data").glob("helpers*.so")
    spec = importlib.util.spec_from_file_location("helpers", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0, 3.0, 0.7]), min_size=1).filter(any)
)
def test_blending_is_gpt_neoxs(data_helpers, weights):
    shares = [weight / sum(weights) for weight in weights]
    count = 400
    parts = [range(count)] * len(weights)
    samples = BlendedSamples(parts, shares, count)
    part, index = np.zeros(count, np.uint8), np.zeros(count, np.int64)
    normalised = np.array(shares) / np.sum(np.array(shares))
    data_helpers.build_blending_indices(part, index, normalised, len(weights), count, False)
    assert samples._part.tolist() == part.tolist()
    assert samples._index.tolist() == index.tolist()


def test_more_data_sets_than_a_byte_counts():
    parts = [[f"{number}"] * 3 for number in range(300)]
    samples = BlendedSamples(parts, [1 / 300] * 300, 600)
    assert sorted({samples[i] for i in range(600)}, key=int) == [str(n) for n in range(300)]
