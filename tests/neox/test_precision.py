"""A training in bfloat16 is that in float32 to bfloat16's rounding, in every layout.

Both start from the same weights, rounded, and step weights that are kept in float32. A run rounds
weights, activations and gradients by up to 2^-9 of themselves, to either side, so that most of it
averages out of a loss and a norm: all rows differ by less than 2^-9. What DeepSpeed does wrong
without ZeRO differs by 3e-3 to 1e-1, see `upstream_fixes/sixteen_bits.py`.
"""

from __future__ import annotations

import pytest

from tests.neox.parallelism_table import TRAIN, Bench, Combination

ROUNDING = 2**-9
BFLOAT16 = {"precision": "bfloat16"}
FUSED = """
from deepspeed.runtime import engine
engine.FP16_UnfusedOptimizer = None
"""
# An optimizer that DeepSpeed does not know as fused is stepped by another class of DeepSpeed's.
UNFUSED = """
from deepspeed.runtime import engine
configure = engine.DeepSpeedEngine._configure_fp16_optimizer
def configure_unfused(self, *args):
    engine.FusedAdam = ()
    return configure(self, *args)
engine.DeepSpeedEngine._configure_fp16_optimizer = configure_unfused
"""
LAYOUTS = {
    "tensor": (Combination(tensor=2), FUSED),
    "tensor, unfused": (Combination(tensor=2), UNFUSED),
    "data": (Combination(data=2), FUSED),
    "pipeline": (Combination(pipeline=2), ""),
    "data, ZeRO 2": (Combination(data=2, zero=2), ""),
}


@pytest.fixture(scope="module")
def bench(neox_checkout, tokenizer_file, tmp_path_factory):
    return Bench(neox_checkout, tokenizer_file, tmp_path_factory.mktemp("precision"))


@pytest.fixture(scope="module")
def in_float32(bench):
    steps, line = bench.run(Combination(), save_first=True)
    assert steps is not None, line
    return steps


def assert_alike(steps: list, wanted: list) -> None:
    """Losses and gradient norms of all steps are equal to bfloat16's rounding, and not equal."""
    for (loss, norm), (wanted_loss, wanted_norm) in zip(steps, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=ROUNDING)
        assert norm == pytest.approx(wanted_norm, rel=ROUNDING)
    assert steps != wanted


@pytest.mark.parametrize("name", LAYOUTS)
def test_bfloat16_trains_as_float32(bench, in_float32, name):
    layout, patch = LAYOUTS[name]
    (bench.folder / "train.py").write_text(TRAIN.replace("neox_args = ", f"{patch}neox_args = ", 1))
    steps, line = bench.run(layout, **BFLOAT16)
    assert steps is not None, line
    assert_alike(steps, in_float32)


def test_weights_drawn_in_bfloat16_are_those_of_every_stage(bench):
    """Here nothing is loaded, and `bf16.enabled` says the precision."""
    (bench.folder / "train.py").write_text(TRAIN)
    drawn = {"precision": None, "bf16": {"enabled": True}}
    wanted, line = bench.run(Combination(recompute=True), save_first=True, **BFLOAT16)
    assert wanted is not None, line
    steps, line = bench.run(Combination(zero=3), **drawn)
    assert steps is not None, line
    assert_alike(steps, wanted)


def test_fp16_alone_is_what_deepspeed_reads(in_neox, config):
    """GPT-NeoX's own derivation has a key that DeepSpeed refuses."""
    code = """
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    given = {"precision": "fp16", "distributed_backend": "nccl", "zero_optimization": {"stage": 1}}
    args = NeoXArgs.from_dict({**settings, **given})
    answer([args.precision, DeepSpeedFP16Config(**args.deepspeed_config["fp16"]).enabled])
    """
    assert in_neox(config, code) == ["fp16", True]


def test_fp32_allreduce_reaches_deepspeed(in_neox, config):
    """Once, and from the launcher to the ranks, which read what it has derived."""
    code = """
    found, extra = [], {"comms_logger": {"enabled": False}}
    for on in (False, True, True):
        given = {**settings, "fp32_allreduce": on, "deepspeed_extra_args": extra}
        args = NeoXArgs.from_dict(given)
        extra = args.deepspeed_extra_args
        found.append(args.deepspeed_config.get("communication_data_type"))
    answer(found)
    """
    assert in_neox({**config, **BFLOAT16}, code) == [None, "fp32", "fp32"]
