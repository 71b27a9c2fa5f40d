"""A gradient that is the only one of a step is kept in bfloat16 where that changes no bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_patch.neox.gradient_dtype import are_single

RUN = dict(
    gradient_accumulation_steps=1,
    pipe_parallel_size=1,
    gradient_predivide_factor=1.0,
    deepspeed_extra_args=None,
)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_one_micro_batch(ranks):
    assert are_single(SimpleNamespace(**RUN), ranks)


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({"gradient_accumulation_steps": 2}, 1),  # adding rounds
        ({"pipe_parallel_size": 2}, 1),
        ({}, 6),  # so does dividing by six
        ({"gradient_predivide_factor": 3.0}, 2),
        ({"deepspeed_extra_args": {"communication_data_type": "fp32"}}, 2),  # `fp32_allreduce`
        ({"deepspeed_extra_args": {"communication_data_type": "fp16"}}, 2),
    ],
)
def test_what_would_round_stays_in_float32(changes, ranks):
    assert not are_single(SimpleNamespace(**RUN | changes), ranks)
