"""Settings of GPT-NeoX that must not change a training: each run equals one without them."""

from __future__ import annotations

import pytest

from tests.neox.parallelism_table import Bench, Combination

RECOMPUTE = {"checkpoint_activations": True}
PARTITION = {**RECOMPUTE, "partition_activations": True}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
OFFLOAD = {"stage": 3, "offload_param": {"device": "cpu"}}
HYBRID = Combination(hybrid=True)
# (combination, its settings), (the one that it must equal, its settings)
EQUAL = {
    "partitioned activations on the CPU": (
        (
            Combination(hybrid=True, tensor=2),
            {
                **PARTITION,
                "checkpoint_in_cpu": True,
                "synchronize_each_layer": True,
            },
        ),
        (HYBRID, {}),
    ),
    "two layers a checkpoint": (
        (
            HYBRID,
            {
                **RECOMPUTE,
                "checkpoint_num_layers": 2,
                "deepspeed_activation_checkpointing": False,
            },
        ),
        (HYBRID, {}),
    ),
    "dropout, recomputed": ((HYBRID, {**DROPOUT, **RECOMPUTE}), (HYBRID, DROPOUT)),
    "parameters kept on the CPU": (
        (
            Combination(zero=3),
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        ),
        (Combination(), {}),
    ),
}


@pytest.fixture(scope="module")
def bench(neox_checkout, tokenizer_file, tmp_path_factory):
    return Bench(neox_checkout, tokenizer_file, tmp_path_factory.mktemp("features"))


@pytest.mark.parametrize("name", EQUAL)
def test_the_numbers_are_those_without_it(bench, name):
    found, wanted = (bench.run(combination, **changes) for combination, changes in EQUAL[name])
    assert found[0] is not None and wanted[0] is not None, (found[1], wanted[1])
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found[0], wanted[0], strict=True):
        assert loss == pytest.approx(wanted_loss, abs=3e-6)
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
