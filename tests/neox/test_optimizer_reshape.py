"""A run that goes on in another layout, with the optimizer's states, against the unbroken run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from convert.command import ConvertError
from convert.reshape_neox import reshape_neox
from megatron_patch.architecture import SettingsError
from tests.neox.training import Run, settings, train, train_once

BATCH, BREAK, END = 4, 3, 6  # sequences of a step, the step where the run breaks, its last step
ZERO = {"zero_optimization": {"stage": 1}}
BFLOAT16 = {**ZERO, "precision": "bfloat16", "data_types": {"grad_accum_dtype": "fp32"}}
HYBRID = {
    "num_layers": 3,
    "attention_config": ["metala", "global", "metala"],
    "norm": "layernorm",
    "rms_norm_epsilon": 1.0e-8,
    "no_weight_tying": False,
    "weight_decay": 0.0,
}
MODELS = {"ZeRO 1": {**ZERO, "norm": "rmsnorm"}, "bfloat16": BFLOAT16, "tied hybrid": HYBRID}
# Of (tensor, pipeline, data) ranks: the unbroken run's, and those with which it goes on.
CASES = [
    ("ZeRO 1", (1, 0, 2), (2, 1, 1), 2e-6),
    ("ZeRO 1", (1, 0, 2), (1, 0, 1), 2e-6),
    ("bfloat16", (1, 2, 1), (2, 1, 2), 1e-3),
    ("tied hybrid", (2, 1, 1), (1, 2, 1), 2e-6),
]


@pytest.fixture
def run_in(neox_checkout, token_data, tokenizer_file, tmp_path):
    """Function: returns the settings of a model in a layout."""

    def config(model: str, layout: tuple[int, int, int], **changes) -> dict:
        tensor, pipeline, data = layout
        share = BATCH // data
        return settings(
            token_data,
            tokenizer_file,
            tensor,
            pipeline,
            train_batch_size=BATCH,
            train_micro_batch_size_per_gpu=min(2, share),
            gradient_accumulation_steps=share // min(2, share),
            num_gpus=tensor * max(pipeline, 1) * data,
            train_iters=END,
            checkpoint_factor=BREAK,
            **{**MODELS[model], **changes},
        )

    return config


@pytest.fixture
def unbroken(neox_checkout, run_in, make_once):
    """Function: trains a model in a layout once; returns the run and its checkpoints."""

    def run(model: str, layout: tuple[int, int, int]) -> tuple[Run, Path]:
        config = run_in(model, layout)
        found, folder = train_once(make_once, f"unbroken {model}", neox_checkout, config)
        return found, folder / "checkpoints"

    return run


def states(folder: Path) -> dict[tuple, torch.Tensor]:
    """Returns all numbers of the optimizer by file, index and kind, read without the converter.
    ZeRO leaves the padding of weights out, the converter does not."""
    found: dict[tuple, torch.Tensor] = {}
    for file in sorted((folder / f"global_step{BREAK}").glob("*_states.pt")):
        content = torch.load(file, weights_only=False)
        if zero := content.get("optimizer_state_dict"):
            base, masters = zero["base_optimizer_state"], zero["single_partition_of_fp32_groups"]
            found |= {(file.name, i, "fp32"): master for i, master in enumerate(masters)}
            assert len(zero["group_paddings"]) == len(masters)
        elif not (base := content.get("optimizer")):
            continue
        for index, kinds in base["state"].items():
            found |= {(file.name, index, kind): value for kind, value in kinds.items()}
    return found


@pytest.mark.parametrize(
    ("model", "before", "after", "tolerance"), CASES, ids=[f"{c[0]} {c[1]}-{c[2]}" for c in CASES]
)
def test_the_loss_goes_on(
    neox_checkout, run_in, unbroken, tmp_path, model, before, after, tolerance
):
    run, checkpoints = unbroken(model, before)
    reshape_neox(
        checkpoints, tmp_path / "new", *after[:2], BREAK, with_optimizer=True,
        data_parallel=after[2],
    )  # fmt: skip
    config = run_in(model, after, load=str(tmp_path / "new"))
    resumed = train(neox_checkout, config, tmp_path)
    rest = {step: loss for step, loss in run.losses.items() if step > BREAK}
    assert resumed.losses == pytest.approx(rest, abs=tolerance)

    # and back again: the same numbers, bit for bit
    reshape_neox(
        tmp_path / "new", tmp_path / "back", *before[:2], with_optimizer=True,
        data_parallel=before[2],
    )  # fmt: skip
    one, other = states(checkpoints), states(tmp_path / "back")
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key][: len(value)] if value.dim() else other[key]), key


def test_with_other_moments_the_loss_does_not_go_on(neox_checkout, run_in, unbroken, tmp_path):
    """So that the test above can fail: the same weights, data and schedule."""
    run, checkpoints = unbroken("ZeRO 1", (1, 0, 2))
    reshape_neox(checkpoints, tmp_path / "new", 1, 0, BREAK, with_optimizer=True, data_parallel=1)
    (file,) = (tmp_path / "new").rglob("*optim_states.pt")
    content = torch.load(file, weights_only=False)
    for values in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        values["exp_avg"].zero_()
    torch.save(content, file)
    config = run_in("ZeRO 1", (1, 0, 1), load=str(tmp_path / "new"))
    resumed = train(neox_checkout, config, tmp_path)
    assert resumed.losses[BREAK + 1] == pytest.approx(run.losses[BREAK + 1], abs=2e-6)
    assert abs(resumed.losses[END] - run.losses[END]) > 1e-2


def test_the_settings_written_keep_the_batch(unbroken, tmp_path, capfd):
    _, checkpoints = unbroken("ZeRO 1", (1, 0, 2))
    written = reshape_neox(
        checkpoints, tmp_path / "new", 1, 0, BREAK, with_optimizer=True, data_parallel=4
    )
    assert written.settings["train_batch_size"] == BATCH
    assert written.settings["train_micro_batch_size_per_gpu"] == 1
    assert written.settings["gradient_accumulation_steps"] == 1
    assert "have train_micro_batch_size_per_gpu: 1;" in capfd.readouterr().err


def test_what_cannot_be_done_is_refused_in_one_line(unbroken, tmp_path):
    _, checkpoints = unbroken("ZeRO 1", (1, 0, 2))
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints, broken)
    step = broken / f"global_step{BREAK}"
    (broken / "latest").write_text(step.name)

    def refused(message: str, error: type = ConvertError, **arguments) -> None:
        given = {"tensor_parallel": 1, "pipeline_parallel": 0, "with_optimizer": True}
        with pytest.raises(error, match=message) as found:
            reshape_neox(broken, tmp_path / "new", **{**given, **arguments})
        assert "\n" not in str(found.value)
        assert not (tmp_path / "new").exists()

    refused("data parallel 3 does not divide train_batch_size, 4", data_parallel=3)
    refused("--data-parallel: found 0, wanted at least 1", data_parallel=0)
    refused("--data-parallel: found 2, wanted none wi", data_parallel=2, with_optimizer=False)

    first, second = (step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))

    def changed(key: str, value: object) -> None:
        content = torch.load(second, weights_only=False)
        content["optimizer_state_dict"][key] = value
        torch.save(content, first)

    saved = first.read_bytes()
    base = torch.load(first, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
    changed("base_optimizer_state", [])
    refused("elastic_checkpoint: found True, wanted false", SettingsError)
    changed("base_optimizer_state", {**base, "state": {0: base["state"][0]}})
    refused("holds optimizer states of 1 tensors, wanted 2")
    changed("base_optimizer_state", {**base, "state": {i: {"square": 1} for i in (0, 1)}})
    refused("found optimizer state 'square', wanted those of Adam or Lion")
    states = {i: {**base["state"][i], "step": torch.tensor(9.0)} for i in (0, 1)}
    changed("base_optimizer_state", {**base, "state": states})
    refused("found step 3.0, wanted 9.0")
    changed("single_partition_of_fp32_groups", [torch.zeros(3)])
    refused("weights of weight_decay_params have 3 numbers")
    damaged = bytearray(saved)
    damaged[len(saved) // 2] ^= 1
    first.write_bytes(damaged)
    refused("damaged|truncated")
    second.unlink()
    first.write_bytes(saved)
    refused("the file is missing")
    third = step / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    second.write_bytes(saved)
    third.write_bytes(saved)
    refused("zero_pp_rank_2_mp_rank_00_optim_states.pt: a file of no rank")
