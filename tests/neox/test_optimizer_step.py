"""The step for which the host does not wait ends where DeepSpeed's own step ends."""

from __future__ import annotations

import pytest
import torch

from tests.neox.test_gradient_sums import tensors_in
from tests.neox.training import neox

# train.py with infinite gradients in the iterations SKIPPED. With OWN DeepSpeed's own step runs.
TRAIN = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
import megatron
from megatron_patch.neox import fast_step, gradient_dtype, skipped_steps
from megatron_patch.neox.mixer import ParallelMetaLAMixer

mix, calls = ParallelMetaLAMixer.forward, {}

def mix_and_break(self, *args, **kwargs):
    y, state = mix(self, *args, **kwargs)
    call = calls[self] = calls.get(self, 0) + 1
    if str(call) in os.environ["SKIPPED"].split(",") and y.requires_grad:
        y.register_hook(lambda d_y: d_y / 0)
    return y, state

ParallelMetaLAMixer.forward = mix_and_break
skipped_steps.MOST = 3
if os.environ["OWN"] == "1":
    fast_step.is_adamw = gradient_dtype.is_adamw = lambda optimizer: False
runpy.run_path("train.py", run_name="__main__")
"""
BFLOAT16 = {
    "precision": "bfloat16",
    "data_types": {"grad_accum_dtype": "fp32"},
    "gradient_clipping": 0.5,
    "lr_decay_iters": 8,
    "zero_optimization": {"stage": 1},
}


def run_with_gaps(checkout, config, folder, skipped: str, own: bool, **changes):
    folder.mkdir()
    (folder / "train_with_gaps.py").write_text(TRAIN)
    settings = config | BFLOAT16 | {"save": str(folder / "checkpoints")} | changes
    environment = {"SKIPPED": skipped, "OWN": str(int(own))}
    return neox(checkout, str(folder / "train_with_gaps.py"), settings, folder, **environment)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_gpus": 2, "train_batch_size": None},
        {"num_gpus": 2, "pipe_parallel_size": 2},
        {"num_gpus": 2, "model_parallel_size": 2},
    ],
    ids=["data parallel", "pipeline", "tensor parallel"],
)
def test_weights_moments_and_counts_are_deepspeeds(neox_checkout, config, tmp_path, changes):
    """With a skipped step before the first update, and another one just before the checkpoint. A
    second update would compare the rounding of the weights to bfloat16."""
    changes = changes | {"train_iters": 3, "checkpoint_factor": 3}
    found = {}
    for own in (True, False):
        run = run_with_gaps(neox_checkout, config | changes, tmp_path / str(own), "1,3", own)
        assert run.returncode == 0, run.output[-3000:]
        assert run.output.count("changed no weight: the norm") == 2
        files = sorted((tmp_path / str(own) / "checkpoints" / "global_step3").glob("*.pt"))
        found[own] = {file.name: torch.load(file, weights_only=False) for file in files}
    assert found[True].keys() == found[False].keys()
    counts = []
    for name, theirs in found[True].items():
        ours = found[False][name]
        if name.startswith("mp_rank"):
            counts.append(ours["skipped_steps"])
            for key in ("skipped_steps", "lr_scheduler", "global_steps"):
                assert ours[key] == theirs[key], key
        tensors, wanted = dict(tensors_in(ours)), dict(tensors_in(theirs))
        assert tensors.keys() == wanted.keys()
        for place, want in wanted.items():
            rtol = 2**-7 if want.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(
                tensors[place], want, rtol=rtol, atol=1e-9, msg=lambda m, p=place: f"{p}: {m}"
            )
        if "optim_states" in name:
            states = ours["optimizer_state_dict"]["base_optimizer_state"]["state"]
            assert {int(state["step"]) for state in states.values()} == {1}
    assert counts and set(counts) == {2}


FLOAT32 = {"precision": "fp32", "data_types": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 2}},
        {**FLOAT32, "zero_optimization": {"stage": 0}},
    ],
    ids=["ZeRO 1", "ZeRO 2", "float32"],
)
def test_a_run_that_changes_nothing_ends(neox_checkout, config, tmp_path, changes):
    """DeepSpeed's other optimizers skip steps in silence as well."""
    changes = {"num_gpus": 1, "train_iters": 20, "checkpoint_factor": 20, **changes}
    skipped = ",".join(map(str, range(2, 20)))
    run = run_with_gaps(neox_checkout, config, tmp_path / "run", skipped, False, **changes)
    assert run.returncode != 0
    assert "MetaLA: iteration 2 changed no weight" in run.output
    assert "MetaLA: 3 iterations in a row changed no weight" in run.output


@pytest.mark.parametrize("layout", [{}, {"pipe_parallel_size": 2}, {"model_parallel_size": 2}])
def test_float32_without_zero_skips_too(neox_checkout, config, tmp_path, layout):
    """DeepSpeed would step, and leave NaN in every weight. The gradients of one layer alone are
    infinite, and of those of the others clipping to the norm leaves none."""
    changes = {**FLOAT32, **layout, "zero_optimization": {"stage": 0}, "num_gpus": 2}
    changes |= {"train_iters": 4, "checkpoint_factor": 4, "train_batch_size": None}
    run = run_with_gaps(neox_checkout, config, tmp_path / "run", "2", False, **changes)
    assert run.returncode == 0, run.output[-3000:]
    assert run.output.count("MetaLA: iteration 2 changed no weight") == 1
    losses = [run.losses[step] for step in (1, 2, 3, 4)]
    assert max(losses) < 7 and "NAN" not in run.output


@pytest.mark.parametrize("changes", [{"train_iters": 3}, {"exit_interval": 3}])
def test_the_last_step_is_told_too(neox_checkout, config, tmp_path, changes):
    """In a run that saves nothing, at its end or at `exit_interval`."""
    changes = {"num_gpus": 1, "train_iters": 5, "save": None, **changes}
    run = run_with_gaps(neox_checkout, config, tmp_path / "run", "3", False, **changes)
    assert run.returncode == 0, run.output[-3000:]
    assert "MetaLA: iteration 3 changed no weight" in run.output and max(run.losses) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, found none")
def test_a_gpu_trains_as_with_deepspeeds_step(neox_checkout, config, tmp_path):
    """With a step that is skipped, before layers are captured."""
    from tests.neox.test_gpus import MODEL

    changes = {**MODEL, "num_gpus": 1, "train_iters": 12, "checkpoint_factor": 12}
    runs = [
        run_with_gaps(neox_checkout, config | changes, tmp_path / str(own), "3", own)
        for own in (True, False)
    ]
    assert [run.returncode for run in runs] == [0, 0]
    assert "iteration 3 changed no weight" in runs[1].output
    theirs, ours = (run.losses for run in runs)
    assert len(ours) == 12 and ours == pytest.approx(theirs, abs=2e-3)
    assert ours[1] == theirs[1]
