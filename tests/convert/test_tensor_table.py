"""The table against the Hugging Face model, and its operations against each other."""

from __future__ import annotations

import pytest
import torch

from convert import attention_settings
from convert.command import ConvertError
from convert.model_shape import AttentionShape, ModelShape, model_shape, with_defaults
from convert.tensor_table import Split, fit_vocabulary, tensor_table

SHAPES = [
    ModelShape(2, 32, 4, 24, 96),
    ModelShape(1, 32, 4, 24, 96, tied=True),
    ModelShape(1, 32, 4, 24, 96, norm="rmsnorm", self_augmentation=False, conv_width=3),
    ModelShape(2, 32, 4, 24, 96, attention=AttentionShape(frozenset([1]), 4, 8, True, False)),
    ModelShape(
        3,
        64,
        8,
        24,
        96,
        norm="rmsnorm",
        attention=AttentionShape(frozenset([0, 2]), 4, 16, False, True),
    ),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_are_the_hugging_face_model(shape):
    from megatron_patch.hf import MetaLAConfig, MetaLAForCausalLM

    of_attention = {}
    if of := shape.attention:
        types = ["linear_attention"] * shape.num_layers
        for layer in of.layers:
            types[layer] = "full_attention"
        of_attention = dict(
            layer_types=types,
            num_key_value_heads=of.num_kv_heads,
            attention_bias=of.has_bias,
            attention_glu_dim=of.intermediate_size,
            attention_glu_bias=of.mlp_has_bias,
        )
    model = MetaLAForCausalLM(
        MetaLAConfig(
            **of_attention,
            vocab_size=shape.padded_vocab_size,
            decoder_embed_dim=shape.hidden_size,
            decoder_layers=shape.num_layers,
            decoder_attention_heads=shape.num_heads,
            glu_dim=shape.intermediate_size,
            norm_type=shape.norm,
            conv_width=shape.conv_width,
            self_augmentation=shape.self_augmentation,
            tie_word_embeddings=shape.tied,
        )
    )
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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pos_emb": "rotary", "rotary_pct": 0.25, "rotary_emb_base": 500},
        {"num_kv_heads": 2, "use_bias_in_mlp": False, "mlp_multiple_of": 40},
        {"attention_config": [[["metala"], 4]]},
    ],
    ids=lambda changes: "-".join(changes) or "none",
)
def test_attention_settings_go_there_and_back(changes):
    """GPT-NeoX's settings, a configuration, settings again: of the same model."""
    from megatron_patch.hf import MetaLAConfig

    sizes = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 96}
    others = {**sizes, "norm": "simplermsnorm", "pos_emb": "none"}
    first = {**others, "attention_config": [[["metala", "flash"], 2]], **changes}
    shape = model_shape(first, 96)
    config = MetaLAConfig(
        decoder_embed_dim=32,
        decoder_layers=4,
        decoder_attention_heads=4,
        glu_dim=96,
        **attention_settings.to_hf(shape, with_defaults(first)),
    )
    assert attention_settings.from_hf(config) == shape.attention
    second = {**others, **attention_settings.to_neox(config)}
    assert model_shape(second, 96) == shape
    for key in ("pos_emb", "rotary_pct", "rotary_emb_base"):
        assert getattr(with_defaults(second), key) == getattr(with_defaults(first), key)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_glu_dim": 8}, "attention_glu_dim: found 8, .* beside glu_dim 40, .* a third"),
        ({"rope_theta": 10.5}, "rope_theta: found 10.5, wanted a whole number"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types: found no linear_attention"),
    ],
)
def test_what_gpt_neox_has_no_settings_for(changes, message):
    from megatron_patch.hf import MetaLAConfig

    hybrid = {"decoder_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    sizes = {"decoder_embed_dim": 32, "decoder_attention_heads": 4, "glu_dim": 40}
    with pytest.raises(ConvertError, match=message):
        attention_settings.to_neox(MetaLAConfig(**{**sizes, **hybrid, **changes}))
