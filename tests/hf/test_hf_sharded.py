"""Training with weights sharded over two processes equals training in one process.

On the CPU over gloo: FSDP 1 and 2 with the blocks that accelerate takes from `_no_split_modules`,
transformers' own FSDP, and DeepSpeed ZeRO 3 under accelerate.
"""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from importlib.util import find_spec

import accelerate
import pytest
import torch
import transformers

from tests.hf import sharded_training
from tests.neox.training import free_port

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="slow, and sharding is torch's and accelerate's: tested with the newer transformers",
)

# For each method, whether to train with untied (False) and tied (True) embeddings.
FSDP = {"fsdp1": [False, True]}
if "fsdp_version" in inspect.signature(accelerate.FullyShardedDataParallelPlugin).parameters:
    FSDP["fsdp2"] = [False, True]
if find_spec("transformers.distributed") is not None:
    # transformers 5.23 unties tied embeddings, also in its own models.
    FSDP["transformers_fsdp"] = [False]


@pytest.fixture(scope="module")
def folders(tiny_model, tokens, tmp_path_factory):
    """Folders with an untied and a tied model, with all kinds of parameters, and a batch each."""
    paths = {}
    for tied in (False, True):
        path = paths[tied] = tmp_path_factory.mktemp("tied" if tied else "untied")
        model = tiny_model(norm_type="rmsnorm", bias=True, tie_word_embeddings=tied)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        model.save_pretrained(path)
        torch.save(tokens(4, 12), path / "input_ids.pt")
    return paths


@pytest.fixture(scope="module")
def in_one_process(folders):
    """For each folder: the weights before training, the losses, and the weights after."""
    results = {}
    for tied, folder in folders.items():
        model = sharded_training.load(folder)
        before = copy.deepcopy(model.state_dict())
        losses = sharded_training.train(
            model, sharded_training.sgd(model), torch.load(folder / "input_ids.pt")
        )
        results[tied] = before, losses, model.state_dict()
    return results


@pytest.fixture(scope="module")
def trained(folders):
    """Trains by all methods in one launch, ZeRO 3 last, since DeepSpeed changes how transformers
    loads models."""
    methods = FSDP | ({"zero3": [False, True]} if find_spec("deepspeed") else {})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    command += [sharded_training.__file__]
    command += [f"{method}:{folders[tied]}" for method in methods for tied in methods[method]]
    process = subprocess.run(
        command,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-6000:]


def check(folder, method, before, losses, after) -> None:
    """Compares losses and weights of the sharded training with those of one process."""
    found_losses, found = torch.load(folder / f"{method}.pt")
    assert len(found_losses) == 2 and found_losses[0] != found_losses[1]
    means = [sum(rank) / 2 for rank in zip(*found_losses, strict=True)]
    assert means == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.05
    # DeepSpeed writes a tied weight once.
    assert set(after) - set(found) <= {"lm_head.weight"} and set(found) <= set(after)
    for name, weight in found.items():
        change = (after[name] - before[name]).abs().max()
        assert change > 1e-5 and (weight - after[name]).abs().max() < 0.01 * change, name


@pytest.mark.parametrize("method", FSDP)
def test_fsdp_trains_as_one_process(folders, in_one_process, trained, method):
    for tied in FSDP[method]:
        check(folders[tied], method, *in_one_process[tied])


def test_zero3_trains_as_one_process(folders, in_one_process, trained):
    pytest.importorskip("deepspeed")
    for tied, path in folders.items():
        check(path, "zero3", *in_one_process[tied])
