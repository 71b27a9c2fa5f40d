"""The table against the Hugging Face model, and its operations against their inverses."""

from __future__ import annotations

import pytest
import torch

from convert.command import ConvertError
from convert.tensor_table import Split, fit_vocabulary, tensor_table
from megatron_patch.architecture import Architecture, AttentionLayers, MetaLAOptions

SHAPES = [
    Architecture(2, 32, 4, 24, 96),
    Architecture(1, 32, 4, 24, 96, tied=True),
    Architecture(1, 32, 4, 24, 96, norm="layernorm", metala=MetaLAOptions(expand_k=1.0)),
    Architecture(
        1,
        32,
        4,
        24,
        96,
        norm="rmsnorm",
        metala=MetaLAOptions(self_augmentation=False, conv_width=3, expand_k=0.25),
    ),
    Architecture(
        2,
        32,
        4,
        24,
        96,
        norm="layernorm",
        layer_types=("metala", "global"),
        attention=AttentionLayers(4, 8, True, False),
    ),
    Architecture(
        3,
        64,
        8,
        24,
        96,
        norm="rmsnorm",
        layer_types=("global", "metala", "flash"),
        attention=AttentionLayers(4, 16, False, True),
    ),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_are_the_hugging_face_model(shape):
    from megatron_patch.hf import MetaLAConfig, MetaLAForCausalLM

    model = MetaLAForCausalLM(MetaLAConfig(**shape.to_hf()))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if shape.tied:
        del wanted["lm_head.weight"]
    pieces = [piece for rule in tensor_table(shape) for piece in rule.pieces]
    assert {piece.name: piece.shape for piece in pieces} == wanted
    assert len(pieces) == len(wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_what_is_split_merges_and_what_is_exported_imports(shape, degree):
    for rule in tensor_table(shape):
        full = torch.randn(rule.shape)
        shards = [rule.shard(full, degree, rank) for rank in range(degree)]
        assert {tuple(s.shape) for s in shards} == {rule.shard_shape(degree)}
        assert torch.equal(rule.merge(shards, ["file"] * degree), full)
        memory = torch.zeros(full.nbytes + 5, dtype=torch.uint8)
        assert torch.equal(rule.merge(shards, ["file"] * degree, out=memory), full)
        assert torch.equal(rule.from_hf(rule.to_hf(full)), full)


def test_replicated_copies_are_compared_bit_by_bit():
    rule = next(r for r in tensor_table(SHAPES[0]) if r.split is Split.REPLICATED)
    same = torch.randn(rule.shape)
    same[0] = float("nan")
    assert rule.merge([same, same.clone()], ["a", "b"]) is same
    other = same.clone()
    other[1] = torch.nextafter(same[1], torch.tensor(9.0))
    with pytest.raises(ConvertError, match=r"mixer.conv1d.weight .* ranks 0 and 1 .*\(a, b\)"):
        rule.merge([same, other], ["a", "b"])


def test_a_vocabulary_is_cut_or_filled_with_zeros():
    rows = torch.randn(6, 2)
    assert torch.equal(fit_vocabulary(rows, 4), rows[:4])
    filled = fit_vocabulary(rows, 8)
    assert torch.equal(filled[:6], rows) and filled[6:].abs().max() == 0
