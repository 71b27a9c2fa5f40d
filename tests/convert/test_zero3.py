"""Checkpoints of ZeRO stage 3: joining the ranks' parts, and errors."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convert import files, verify
from convert.command import ConvertError
from convert.neox_to_hf import neox_to_hf
from convert.reshape_neox import reshape_neox
from convert.zero3 import Zero3Checkpoint
from tests.convert.synthetic import Model, rank_layers, write
from tests.damage import flip_bit
from tests.neox.training import settings, train


@pytest.fixture(scope="module")
def deepspeed_objects() -> dict[str, object]:
    """The objects that DeepSpeed pickles with the weights."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return {
        "ZeroStageEnum": ZeroStageEnum.weights,
        "LossScaler": LossScaler(scale=1.0),
        "DynamicLossScaler": DynamicLossScaler(2**16, 2, 1000, 1, 2, False),
    }


def write_zero3(
    folder: Path,
    model: Model,
    ranks: int,
    vocab_file: Path,
    objects: dict[str, object],
    scaler: str = "LossScaler",
    groups: int = 3,
    prefix: str = "bf16_",
) -> dict[str, torch.Tensor]:
    """Writes a checkpoint as DeepSpeed does, its tensors spread over `groups` flat groups.

    Returns:
        the Hugging Face tensors in float32, padding rows included.
    """
    write(folder, model, 1, 0, vocab_file)
    step = folder / "global_step7"
    states = torch.load(step / "mp_rank_00_model_states.pt", weights_only=False)
    (step / "mp_rank_00_model_states.pt").unlink()
    exact = Model(**{**model.__dict__, "dtype": torch.float32})
    hf = exact.tensors(exact.rows(1))
    module = {
        f"sequential.{index}.{name}": tensor
        for index, layer in rank_layers(exact, hf, 1, 0).items()
        for name, tensor in layer.items()
    }
    names = sorted(module)[::-1]  # not in the order of the layers
    by_group = [names[group::groups] for group in range(groups)]
    shapes = [OrderedDict((name, module[name].shape) for name in group) for group in by_group]
    states |= {
        "module": OrderedDict((name, torch.empty(0, dtype=model.dtype)) for name in module),
        "param_shapes": shapes,
        "dp_world_size": ranks,
        "ds_version": "0.19.8",
    }
    for rank in range(ranks):
        flat = []
        for group in by_group:
            pieces = []
            for name in group:
                size = math.ceil(module[name].numel() / ranks)
                padded = torch.zeros(size * ranks)
                padded[: module[name].numel()] = module[name].flatten()
                pieces.append(padded[rank * size : (rank + 1) * size])
            flat.append(torch.nn.Parameter(torch.cat(pieces)))
        optimizer = {
            "zero_stage": objects["ZeroStageEnum"],
            "loss_scaler": objects[scaler],
            "partition_count": ranks,
            "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(9)}}},
            "fp32_flat_groups": flat,
        }
        stem = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save(states, step / f"{stem}_model_states.pt")
        torch.save({"optimizer_state_dict": optimizer}, step / f"{prefix}{stem}_optim_states.pt")
    return hf


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_put_together(
    ranks, dtype, vocab_file, deepspeed_objects, tmp_path, monkeypatch
):
    """Covers sizes that the ranks do not divide, more than ten ranks, and files opened again."""
    monkeypatch.setattr("convert.zero3.MAPPED_BYTES", 1000)
    model = Model(layers=3, dtype=dtype, norm="rmsnorm", attention=(1,), tied=True)
    scaler, prefix = ("LossScaler", "bf16_") if ranks % 2 else ("DynamicLossScaler", "")
    hf = write_zero3(
        tmp_path / "neox", model, ranks, vocab_file, deepspeed_objects, scaler, prefix=prefix
    )
    neox_to_hf(tmp_path / "neox", tmp_path / "hf", keep_vocab_padding=True)
    found = load_file(tmp_path / "hf/model.safetensors")
    assert found.keys() == hf.keys()
    for name, tensor in hf.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name

    reshape_neox(tmp_path / "neox", tmp_path / "new", 2, 1)
    neox_to_hf(tmp_path / "new", tmp_path / "other", keep_vocab_padding=True)
    other = load_file(tmp_path / "other/model.safetensors")
    assert all(torch.equal(other[name], found[name]) for name in found)


def test_deepspeed_joins_them_alike(vocab_file, deepspeed_objects, tmp_path):
    """`--verify` loads the same tensors into GPT-NeoX as the converter reads."""
    model = Model(dtype=torch.bfloat16)
    write_zero3(tmp_path / "neox", model, 3, vocab_file, deepspeed_objects)
    step = tmp_path / "neox/global_step7"
    reader, theirs = Zero3Checkpoint(step), verify.zero3_tensors(step)
    assert theirs.keys() == reader.tensors().keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(reader.read(name), tensor), name


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


MODEL_1 = "zero_pp_rank_1_mp_rank_00_model_states.pt"
OPTIMIZER_1 = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


def damage(file: Path, change) -> None:
    states = torch.load(file, weights_only=False)
    change(states)
    torch.save(states, file)


def cut(states: dict) -> None:
    groups = states["optimizer_state_dict"]["fp32_flat_groups"]
    groups[1] = groups[1].detach()[:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda step: (step / OPTIMIZER_1).unlink(), "found 1 files .*optim_states.pt, wanted 2"),
        (
            lambda step: (step / MODEL_1).unlink(),
            "rank_0_.*: saved by one of 2 data-parallel ranks, but the folder has files of 1",
        ),
        (
            lambda step: (step / MODEL_1).rename(step / MODEL_1.replace("k_1", "k_2")),
            "rank_2_.*: the file was saved as zero_pp_rank_1_.*: it was renamed",
        ),
        (
            lambda step: (step / MODEL_1.replace("k_1", "k_0")).unlink(),
            "rank 0 has no file such as zero_pp_rank_1_mp_rank_00_model_states.pt",
        ),
        (
            lambda step: (step / OPTIMIZER_1[5:]).write_bytes((step / OPTIMIZER_1).read_bytes()),
            "zero_pp_rank_1_.*optim_states.pt lies beside it|it was renamed",
        ),
        (
            lambda step: torch.save({"module": {}}, step / "mp_rank_00_model_states.pt"),
            "mp_rank_00_model_states.pt lies beside files of ZeRO stage 3: two layouts are mixed",
        ),
        (
            lambda step: torch.save({}, step / "zero_pp_rank_0_mp_rank_01_model_states.pt"),
            "mp_rank_01.*: ZeRO stage 3 with model_parallel_size above 1",
        ),
        (lambda step: damage(step / OPTIMIZER_1, cut), "rank_1.*: fp32_flat_groups have sizes"),
        (lambda step: flip_bit(step / OPTIMIZER_1), r"rank_1.*: damaged: fp32_flat_groups\[\d"),
        (
            lambda step: damage(step / OPTIMIZER_1, lambda s: s.update(extra=Attack())),
            "optim_states.pt: refused: reading it would run code",
        ),
        (
            lambda step: damage(step / MODEL_1, lambda s: s.update(iteration=6)),
            "a file of iteration 6 in the folder of 7",
        ),
        (
            lambda step: (step / OPTIMIZER_1).write_bytes((step / OPTIMIZER_1).read_bytes()[:-99]),
            "optim_states.pt: truncated",
        ),
    ],
)
def test_what_is_incomplete_or_mixed_is_refused(
    change, message, vocab_file, deepspeed_objects, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_zero3(tmp_path / "neox", Model(), 2, vocab_file, deepspeed_objects)
    change(tmp_path / "neox/global_step7")
    with pytest.raises(ConvertError, match=message) as info:
        neox_to_hf(tmp_path / "neox", tmp_path / "hf")
    assert "\n" not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ["neox"]


def test_deepspeeds_objects_are_read_as_stand_ins(deepspeed_objects, tmp_path):
    """DeepSpeed's code does not run, even if it is installed."""
    torch.save(deepspeed_objects, tmp_path / "file.pt")
    found = files.load_torch_file(tmp_path / "file.pt")
    assert found["ZeroStageEnum"] == 3
    assert found["LossScaler"].cur_scale == 1
    assert found["DynamicLossScaler"].cur_scale == 2**16
    for name, theirs in deepspeed_objects.items():
        assert type(found[name]) is not type(theirs)
        assert type(found[name]).__name__ == type(theirs).__name__


class Named:
    """Is stored as Python 3.11.0 to 3.11.3 store a member of an enumeration."""

    def __init__(self, kind: type, name: str):
        self.kind, self.name = kind, name

    def __reduce__(self):
        return getattr, (self.kind, self.name)


def test_a_stage_that_is_stored_by_its_name_is_read(deepspeed_objects, tmp_path):
    kind = type(deepspeed_objects["ZeroStageEnum"])
    for stage in ("disabled", "optimizer_states", "gradients", "weights"):
        torch.save({"stage": Named(kind, stage)}, tmp_path / "file.pt")
        assert files.load_torch_file(tmp_path / "file.pt")["stage"] == kind[stage].value
    for other in (Named(kind, "__init__"), Named(type(deepspeed_objects["LossScaler"]), "weights")):
        torch.save({"stage": other}, tmp_path / "file.pt")
        with pytest.raises(files.ConvertError, match="refused: reading it would run code"):
            files.load_torch_file(tmp_path / "file.pt")


def test_a_training_of_two_ranks_is_exported(
    neox_checkout, token_data, tokenizer_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("GPT_NEOX_PATH", str(neox_checkout))
    config = settings(
        token_data,
        tokenizer_file,
        num_layers=3,
        attention_config=["metala", "global", "metala"],
        pos_emb="rotary",
        norm="rmsnorm",
        precision="bfloat16",
        # several flat groups
        zero_optimization={"stage": 3, "sub_group_size": 20_000},
        num_gpus=2,
        train_iters=2,
        save=str(tmp_path / "neox"),
        checkpoint_factor=2,
    )
    train(neox_checkout, config, tmp_path / "run")
    found = neox_to_hf(tmp_path / "neox", tmp_path / "hf", check=True)
    assert found.largest_difference < 1e-5 and found.largest_logit > 0.5
    exported = load_file(tmp_path / "hf/model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    reshape_neox(tmp_path / "neox", tmp_path / "new", 2, 1)
    neox_to_hf(tmp_path / "new", tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in exported.items())
