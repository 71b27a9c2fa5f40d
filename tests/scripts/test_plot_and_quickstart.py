"""plot_loss.py reads the logs of both engines; small parts of the quickstart."""

from __future__ import annotations

import pytest
import quickstart
from plot_loss import read_losses
from quickstart import StepFailed, largest_difference, start_anew_if_changed

from convert.verify import Comparison

NEOX_LOG = """\
> building HFTokenizer tokenizer ...
 samples/sec: 15.9 | iteration        5/     240 | elapsed time per iteration (ms): 501.8 | \
learning rate: 1.2E-03 | approx flops per GPU: 92.0GFLOPS | lm_loss: 8.096175E+00 | number of \
skipped iterations:   0 | number of nan iterations:   0 |
time (ms) | forward: 180.48 | backward: 306.71
 validation results at iteration 5 | lm_loss value: 7.642954E+00 | lm_loss_ppl value: 1.0E+02 |
 samples/sec: 15.9 | iteration       10/     240 | learning rate: 1.2E-03 | lm_loss: 9.0E+00 |
 validation results at the end of training for val data | lm_loss value: 1.0E+00 |
"""
RESUMED = " samples/sec: 15.9 | iteration       10/     240 | lm_loss: 7.5E+00 | number of\n"
METRICS = """\
{"iteration": 6, "loss": 8.25, "learning_rate": 0.0005, "grad_norm": 2.0}
{"iteration": 6, "eval_loss": 8.0}
{"iteration": 12, "loss": 7.75, "learning_rate": 0.0011, "grad_norm": 1.7}
"""


@pytest.fixture
def logs(tmp_path):
    (tmp_path / "train.log").write_text(NEOX_LOG + RESUMED)
    (tmp_path / "metrics.jsonl").write_text(METRICS)
    return tmp_path / "train.log", tmp_path / "metrics.jsonl"


def test_losses_of_both_engines(logs):
    neox, trainer = map(read_losses, logs)
    assert (neox.train, neox.valid) == ({5: 8.096175, 10: 7.5}, {5: 7.642954})
    assert (trainer.train, trainer.valid) == ({6: 8.25, 12: 7.75}, {6: 8.0})


def test_picture(run_command, logs, tmp_path):
    output = tmp_path / "loss.png"
    result = run_command("plot_loss.py", *logs, "--output", output, "--labels", "a", "b")
    assert result.returncode == 0, result.stderr
    assert output.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty.log").write_text("nothing\n")
    failed = run_command("plot_loss.py", tmp_path / "empty.log", "--output", output)
    assert failed.returncode == 1
    assert "empty.log: holds no training losses" in failed.stderr


def test_quickstart_reads_what_the_verifications_print():

    comparison = Comparison(9.45e-06, 1e-3, 10.45, 320)
    assert largest_difference(f"wrote x\nverified {comparison}\n") == 9.45e-06
    assert largest_difference("Largest logit difference after reloading: 4.433e-06\n") == 4.433e-06
    with pytest.raises(StepFailed):
        largest_difference("verified no\n")


def test_quickstart_repeats_a_training_only_of_other_inputs(tmp_path):
    config, folder = tmp_path / "a.yml", tmp_path / "neox"
    config.write_text("x: 1")
    start_anew_if_changed(folder, config)
    (folder / "checkpoint").touch()
    start_anew_if_changed(folder, config)
    assert (folder / "checkpoint").exists()
    config.write_text("x: 2")
    start_anew_if_changed(folder, config)
    assert not (folder / "checkpoint").exists()


def test_quickstart_text_is_reproducible(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "TEXT_BYTES", 100_000)
    for name in ("a.jsonl", "b.jsonl"):
        quickstart.write_text(tmp_path / name)
    first = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert first == (tmp_path / "b.jsonl").read_text(encoding="utf-8")
    assert 100_000 < len(first) < 1_000_000 and "import" in first
