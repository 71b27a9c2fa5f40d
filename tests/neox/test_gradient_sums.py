"""Sums of gradients that begin with a step's first gradient have the bits of sums from zeros."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_patch.neox import gradient_sums
from megatron_patch.neox.gradient_sums import GradientSums
from tests.neox.training import neox

SHAPES = [[(3, 2), (5,)], [(7,)]]  # of the parameters of two groups
# train.py, in which `aug_balance` gets no gradient on the first rank in some micro-batches, and one
# step is skipped because its gradients are infinite. With OWN, DeepSpeed's own code adds to float32
# sums that are zeros.
TRAIN = """
import os, runpy
from megatron_patch.neox import fast_step, gradient_dtype
from megatron_patch.neox.mixer import ParallelMetaLAMixer

mix, calls = ParallelMetaLAMixer.forward, {}

def mix_without(self, x, *args, **kwargs):
    call = calls[self] = calls.get(self, -1) + 1
    aug = self._parameters["aug_balance"]
    if os.environ["RANK"] == "0" and call in (2, 3, 6):
        self._parameters["aug_balance"] = aug.detach()
    try:
        y, state = mix(self, x, *args, **kwargs)
    finally:
        self._parameters["aug_balance"] = aug
    if call == 8:
        y.register_hook(lambda d_y: d_y / 0)
    return y, state

prepare = fast_step.prepare_engine

def tell_dtype(engine, neox_args):
    os.write(1, b"sums in %s\\n" % str(engine.optimizer.grad_acc_dtype).encode())
    prepare(engine, neox_args)

def keep_deepspeeds_own(engine, when_added):
    engine.optimizer.immediate_grad_update = True
    engine._config.bfloat16_config.immediate_grad_update = True
    engine.optimizer.create_grad_acc_hooks()

ParallelMetaLAMixer.forward = mix_without
fast_step.prepare_engine = tell_dtype
if os.environ["OWN"] == "1":
    gradient_dtype.are_single = lambda *_: False
    fast_step.add_gradients_at_once = keep_deepspeeds_own
runpy.run_path("train.py", run_name="__main__")
"""


def stand_in_optimizer(shapes=SHAPES) -> SimpleNamespace:
    """Returns what GradientSums reads of a BF16_Optimizer. The sums hold what no step may read."""
    groups = [[nn.Parameter(torch.zeros(shape)) for shape in group] for group in shapes]
    return SimpleNamespace(
        bf16_groups=groups,
        fp32_groups_gradients=[[torch.full((p.numel(),), torch.nan) for p in g] for g in groups],
        fp32_groups_has_gradients=[[False] * len(group) for group in groups],
    )


class Steps:
    """Adds gradients both ways: to zeros of PyTorch's, and by GradientSums."""

    def __init__(self):
        self.added: list[nn.Parameter] = []
        self.optimizer = stand_in_optimizer()
        self.sums = GradientSums(self.optimizer, self.added.append)
        self.parameters = [p for group in self.optimizer.bf16_groups for p in group]
        self.generator = torch.Generator().manual_seed(0)
        self.begin()

    def begin(self) -> None:
        self.sums.forget()
        self.wanted = [torch.zeros(p.numel()) for p in self.parameters]

    def gradients(self, numbers) -> dict[nn.Parameter, torch.Tensor]:
        found = {}
        for number in numbers:
            p = self.parameters[number]
            gradient = torch.randn(p.shape, generator=self.generator).bfloat16()
            gradient.view(-1)[0] = -0.0
            self.wanted[number] += gradient.flatten()
            found[p] = gradient
        return found

    def add(self, *numbers: int) -> None:
        for p, gradient in self.gradients(numbers).items():
            self.sums.add(p, gradient)

    def replay(self, *numbers: int) -> None:
        """Does what the replay of a backward graph of these parameters does."""
        gradients = self.gradients(numbers)
        self.sums.before_replay(list(gradients))
        for p, gradient in gradients.items():
            self.sums.capture(p, gradient)
        for p in gradients:
            self.sums.note(p)

    def end(self) -> None:
        """Compares the bits, and leaves what the next step must not see."""
        self.sums.complete()
        for p, wanted in zip(self.parameters, self.wanted, strict=True):
            total = self.sums.of(p)
            assert torch.equal(total.view(torch.int32), wanted.view(torch.int32))
            total.fill_(torch.nan)
        self.begin()


@pytest.fixture
def steps() -> Steps:
    return Steps()


def test_one_micro_batch_a_step(steps):
    for _ in range(2):
        steps.add(0, 1, 2)
        steps.end()


def test_a_parameter_without_a_gradient_sums_to_zero(steps):
    steps.add(0, 1, 2)
    steps.end()
    steps.add(0)
    steps.end()
    steps.end()
    steps.add(1, 2)
    steps.end()


def test_a_second_gradient_is_added(steps):
    """Of one micro-batch, or of the next one, in which another parameter gets its first."""
    for _ in range(2):
        steps.add(0, 2)
        steps.add(0)
        steps.add(0, 1)
        steps.end()


def test_a_step_that_is_skipped_leaves_nothing(steps):
    steps.add(0, 1)
    steps.sums.of(steps.parameters[0]).fill_(torch.inf)
    steps.begin()
    steps.add(0, 2)
    steps.end()


def test_replays_and_launches_in_any_order(steps):
    """Of layers {0, 1} and {2}, with one to three micro-batches a step."""
    for micro_batches in ("r", "rr", "rlr", "lrr", "r", "l", "rl", "rrr", "r"):
        for kind in micro_batches:
            act = steps.replay if kind == "r" else steps.add
            act(2)
            act(0, 1)
        steps.end()


def test_a_replay_after_gradients_of_a_part_of_its_parameters(steps):
    for _ in range(2):
        steps.add(1)
        steps.replay(0, 1)
        steps.replay(2)
        steps.end()


def test_the_flag_of_replays_changes_twice_a_step_at_most(steps):
    written = []
    steps.sums.replay_flag = SimpleNamespace(fill_=written.append)
    steps.sums.capture = lambda *_: None
    for _ in range(3):
        for _ in range(4):
            steps.replay(2)
            steps.replay(0, 1)
        steps.begin()
    assert written == [False, True] * 2 + [False]


def test_deepspeed_is_told_of_each_gradient(steps):
    first, second, third = steps.parameters
    steps.add(0)
    steps.replay(2)
    assert steps.added == [first, third]
    assert steps.optimizer.fp32_groups_has_gradients == [[True, False], [True]]
    assert first._hp_grad is steps.sums.of(first) and not hasattr(second, "_hp_grad")
    steps.sums.complete()
    assert steps.optimizer.fp32_groups_has_gradients == [[True, False], [True]]
    steps.begin()
    assert steps.optimizer.fp32_groups_has_gradients == [[False, False], [False]]


def test_a_deepspeed_that_adds_otherwise_is_an_error():
    """Its sums would never be emptied."""
    optimizer = stand_in_optimizer()
    optimizer.immediate_grad_update = True
    with pytest.raises(AttributeError, match="_update_hp_grad"):
        gradient_sums.add_gradients_at_once(SimpleNamespace(optimizer=optimizer))


@pytest.mark.parametrize(
    ("changes", "zero"),
    [
        ({"num_gpus": 2, "gradient_accumulation_steps": 2}, {"overlap_comm": True}),
        ({"num_gpus": 2, "pipe_parallel_size": 2, "gradient_accumulation_steps": 2}, {}),
        ({"gradient_accumulation_steps": 1}, {}),
        ({"num_gpus": 2, "gradient_accumulation_steps": 1}, {"overlap_comm": True}),
        ({"num_gpus": 2, "gradient_accumulation_steps": 1}, {}),
    ],
    ids=[
        "overlapped averages",
        "pipeline",
        "one rank, one micro-batch",
        "overlapped averages, one micro-batch",
        "averages, one micro-batch",
    ],
)
def test_training_is_that_of_sums_from_zeros(neox_checkout, config, tmp_path, changes, zero):
    """Weights, master weights and moments, with tied embeddings. The sums of one gradient are in
    bfloat16, DeepSpeed's own in float32."""
    program, states = tmp_path / "train_with_gaps.py", []
    program.write_text(TRAIN)
    for own in (True, False):
        folder = tmp_path / str(own)
        changes = changes | dict(
            precision="bfloat16",
            data_types={"grad_accum_dtype": "fp32"},
            no_weight_tying=False,
            train_batch_size=None,
            train_iters=10,
            checkpoint_factor=10,
            gradient_clipping=0.1,
            save=str(folder / "checkpoints"),
            zero_optimization={"stage": 1, "reduce_bucket_size": 10_000} | ({} if own else zero),
        )
        run = neox(neox_checkout, str(program), config | changes, folder, OWN=str(int(own)))
        assert run.returncode == 0, run.output[-3000:]
        is_single = changes["gradient_accumulation_steps"] == 1 and not own
        dtype = "bfloat16" if is_single else "float32"
        assert run.output.count(f"sums in torch.{dtype}") == changes.get("num_gpus", 1)
        files = sorted(folder.glob("checkpoints/global_step10/*.pt"))
        loaded = {file.name: torch.load(file, weights_only=False) for file in files}
        skipped = {f["skipped_steps"] for f in loaded.values() if "skipped_steps" in f}
        assert skipped == {1}
        states.append(dict(tensors_in(loaded)))
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    assert [name for name, x in states[0].items() if not torch.equal(x, states[1][name])] == []


def tensors_in(value, name: str = ""):
    """Yields names and tensors of nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from tensors_in(part, f"{name}/{key}")
