"""Sequences that are split over ranks, in real trainings: losses and gradients as on one rank."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_patch.neox import token_groups
from tests.neox.conversion import export
from tests.neox.training import neox, settings

# The stock train.py, but a layer begins with the same weights in every layout, and each rank writes
# what `Training` reads.
SCRIPT = """
import os, sys, time, torch, zlib
sys.path.insert(0, os.getcwd())
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad
from megatron import mpu, training
from megatron.neox_arguments import NeoXArgs
from megatron_patch.neox.layer import ParallelMetaLALayerPipe
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GATED = ("mlp.gate_up_proj", "mlp.linear1")  # two matrices, each split over the ranks
steps = []
get_model, take_step = training.get_model, DeepSpeedEngine._take_model_step

def key_of(name):
    return name.replace("tied_modules.embed", "0").removeprefix("sequential.")

@torch.no_grad()
def get_model_with_weights(*args, **kwargs):
    model = get_model(*args, **kwargs)
    ranks, rank = mpu.get_model_parallel_world_size(), mpu.get_model_parallel_rank()
    for name, p in model.named_parameters():
        p.parts, shape = None, list(p.shape)
        if getattr(p, "model_parallel", False):
            dim, stride = p.parts = p.partition_dim, 1 + any(n in name for n in GATED)
            shape[dim] *= ranks
        generator = torch.Generator().manual_seed(zlib.crc32(key_of(name).encode()))
        whole = torch.randn(shape, generator=generator)
        if p.parts:
            whole = torch.cat(whole.chunk(ranks * stride, dim)[rank::ranks], dim)
        is_norm = p.dim() == 1 and name.endswith("weight")
        p.copy_(1 + 0.1 * whole if is_norm else 0.05 * whole)
    return model

def take_and_note(self, *args, **kwargs):
    gradients = {}
    for name, p in self.module.named_parameters():
        gradient = getattr(p, "_hp_grad", p.grad)
        gradient = safe_get_full_grad(p) if gradient is None else gradient
        gradients[key_of(name)] = [gradient.view(p.shape).float().clone(), p.parts]
    take_step(self, *args, **kwargs)
    norm = self.get_global_grad_norm()
    steps.append([None if norm is None else float(norm), gradients])

class Storages(TorchDispatchMode):
    "Counts the bytes of what is made in it and still there afterwards."
    def __enter__(self):
        self.made = {}
        return super().__enter__()
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result
    def kept(self):
        return sum(size for storage, size in self.made.values() if not storage.expired())

def forward_and_count(self, args):
    if kept or not self.training:
        return forward(self, args)
    with Storages() as storages:
        output = forward(self, args)
    time.sleep(0.5)  # the threads of gloo let go of their tensors a moment later
    kept.append(storages.kept())
    return output

kept, forward = [], ParallelMetaLALayerPipe.forward
ParallelMetaLALayerPipe.forward = forward_and_count
training.get_model = get_model_with_weights
DeepSpeedEngine._take_model_step = take_and_note
neox_args = NeoXArgs.consume_neox_args()
neox_args.configure_distributed_args()
neox_args.build_tokenizer()
training.pretrain(neox_args=neox_args)
place = [mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()]
torch.save([*place, steps, *kept], os.path.join(os.environ["STEPS"], os.environ["RANK"]))
"""

# Eight samples a step. Some of a slice's tokens do not count in the loss.
RUN = {
    "train_iters": 3,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "eod_mask_loss": True,
    "gradient_clipping": 0.1,
}


class Training:
    """Losses of a training's steps and validation. Of each rank: its tensor-parallel rank, of how
    many; norms and gradients of its steps; bytes that its first MetaLA layer keeps of a forward
    pass."""

    def __init__(self, checkout: Path, config: dict, folder: Path):
        files = folder / "steps"
        files.mkdir(parents=True)
        (folder / "train.py").write_text(SCRIPT)
        run = neox(checkout, str(folder / "train.py"), config, folder, STEPS=str(files))
        assert run.returncode == 0, run.output[-6000:]
        self.losses, self.validation = run.losses, run.validation_losses
        self.output = run.output
        self.ranks = [torch.load(file) for file in sorted(files.iterdir())]

    def assert_equal(self, one: Training) -> None:
        """To float32: all losses, and each rank's gradients in the first step, and their norm. Adam
        magnifies rounding in the steps after it."""
        assert self.losses == pytest.approx(one.losses, abs=1e-5)
        assert self.validation == pytest.approx(one.validation, abs=1e-5)
        [[_, _, [[_, whole], *_], _]] = one.ranks
        squares = sum(g.double().square().sum().item() for g, _ in whole.values())
        for rank, ranks, [[norm, gradients], *_], _ in self.ranks:
            for name, (gradient, split) in gradients.items():
                expected, _ = whole[name]
                largest = expected.abs().max().item()
                if split:
                    dim, stride = split
                    expected = torch.cat(expected.chunk(ranks * stride, dim)[rank::ranks], dim)
                assert (gradient - expected).abs().max().item() < 5e-5 * largest, name
            if norm is not None:
                assert norm == pytest.approx(squares**0.5, rel=1e-5)


@pytest.fixture(scope="module")
def train(neox_checkout, token_data, short_documents, tokenizer_file, tmp_path_factory):
    def train(**changes) -> Training:
        data = short_documents if "reset_at_document" in changes.get("metala", ()) else token_data
        config = settings(data, tokenizer_file) | RUN | changes
        return Training(neox_checkout, config, tmp_path_factory.mktemp("split"))

    return train


@pytest.fixture(scope="module")
def one(train) -> Training:
    return train(num_gpus=1)


CONTEXT = {"metala": {"context_parallel_size": 2}}
MOST = {"recompute": "most"}


def zero(stage: int) -> dict:
    return {"zero_optimization": {"stage": stage}}


@pytest.mark.parametrize(
    "changes",
    [
        {
            "num_gpus": 2,
            "checkpoint_activations": True,
            "metala": {"context_parallel_size": 2, **MOST},
            **zero(1),
        },
        {"num_gpus": 4, "gradient_accumulation_steps": 2, **zero(2)},
        {
            "num_gpus": 4,
            "model_parallel_size": 2,
            "metala": {"context_parallel_size": 2, **MOST},
        },
        {"num_gpus": 4, "pipe_parallel_size": 2},
        {"num_gpus": 4, "metala": {"context_parallel_size": 4, **MOST}, **zero(3)},
    ],
    ids=["ZeRO 1, recomputed", "data, ZeRO 2", "tensor", "pipeline", "of four, ZeRO 3"],
)
def test_context_parallel_ranks_train_as_one(train, one, changes):
    train(**CONTEXT | changes).assert_equal(one)


SEQUENCE = {"sequence_parallel": True, "model_parallel_size": 2}
# Weights of norms, and biases after row-parallel products.
HYBRID = {
    "no_weight_tying": False,
    "num_layers": 4,
    "attention_config": ["metala", "global", "metala", "metala"],
    "norm": "layernorm",
    "rms_norm_epsilon": 1e-8,  # GPT-NeoX's, since this norm does not read it
    "pos_emb": "rotary",
    "mlp_multiple_of": 96,
}


@pytest.fixture(scope="module")
def one_hybrid(train) -> Training:
    return train(num_gpus=1, **HYBRID)


def test_sequence_parallel_ranks_train_as_one(train, one_hybrid):
    """And each of two ranks keeps half as much, and with `recompute: most` less than a quarter.
    PyTorch's convolution keeps copies of all gathered tokens, which the kernels do not."""
    [*_, whole] = one_hybrid.ranks[0]
    for metala, share in (({}, 0.51), (MOST, 0.25)):
        training = train(num_gpus=2, metala=metala, **SEQUENCE, **HYBRID)
        training.assert_equal(one_hybrid)
        for *_, kept in training.ranks:
            assert kept < share * whole


def test_sequence_parallel_stages_train_as_one(train, one_hybrid):
    changes = {"pipe_parallel_size": 2, "checkpoint_activations": True, "metala": MOST, **zero(1)}
    train(num_gpus=4, **SEQUENCE, **HYBRID, **changes).assert_equal(one_hybrid)


def test_sequence_and_context_parallel_ranks_train_as_one(train, one, neox_checkout, tmp_path):
    """Four ranks, each with a quarter of a sequence's tokens. What they saved is verified."""
    folder = tmp_path / "checkpoints"
    saved = {"save": str(folder), "checkpoint_factor": RUN["train_iters"]}
    train(num_gpus=4, **SEQUENCE, **CONTEXT, **saved).assert_equal(one)
    export(neox_checkout, folder, tmp_path / "hf", "--verify")


# Packed documents, some shorter than a rank's part of a sequence, and two samples a batch. What the
# first token of a document reads out is almost constant: with the usual epsilon the LayerNorm would
# magnify its rounding.
DOCUMENTS = {"reset_at_document": True, "output_norm_eps": 1e-2}


@pytest.fixture(scope="module")
def one_packed(train) -> Training:
    return train(num_gpus=1, metala=DOCUMENTS)


@pytest.fixture(scope="module")
def one_packed_hybrid(train) -> Training:
    return train(num_gpus=1, metala=DOCUMENTS, **HYBRID)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"pipe_parallel_size": 2, "checkpoint_activations": True, **zero(1)}),
        (4, {}),
        (2, SEQUENCE),
    ],
    ids=["of two, pipeline", "of four", "sequence"],
)
def test_documents_are_apart_on_context_parallel_ranks(train, one_packed, size, changes):
    metala = {**DOCUMENTS, "context_parallel_size": size}
    train(num_gpus=4, metala=metala, **changes).assert_equal(one_packed)


@pytest.mark.parametrize("stages", [0, 2])
def test_documents_are_apart_on_sequence_parallel_ranks(train, one_packed_hybrid, stages):
    changes = {"num_gpus": max(2 * stages, 2), "pipe_parallel_size": stages}
    training = train(**changes, metala=DOCUMENTS, **SEQUENCE, **HYBRID)
    training.assert_equal(one_packed_hybrid)


def test_a_later_run_of_a_process_has_no_group_of_an_earlier_one(monkeypatch):
    monkeypatch.setattr(token_groups, "_context", None)
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    monkeypatch.setattr(token_groups, "_new_group", tuple)
    monkeypatch.setattr(token_groups.dist, "get_process_group_ranks", lambda group: [4, 5, 6, 7])
    package, initialize = ModuleType("megatron"), ModuleType("megatron.initialize")
    package.mpu = SimpleNamespace(
        get_data_parallel_group=lambda: None, get_data_parallel_rank=lambda: 3
    )
    initialize.initialize_megatron = lambda neox_args: None
    for module in (package, initialize):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    token_groups.make_token_groups()
    groups = []
    for size in (2, 1):
        initialize.initialize_megatron(
            SimpleNamespace(attention_config=["metala"], metala={"context_parallel_size": size})
        )
        groups.append(token_groups.context_group())
    assert groups == [(6, 7), None]
