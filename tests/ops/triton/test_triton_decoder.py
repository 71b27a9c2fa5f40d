"""A step of a whole decoder in one launch against the model's own layers in float64."""

import pytest
import torch

from megatron_patch.hf import MetaLACache
from megatron_patch.hf.decoding_metala import _kernel, _obstacle
from megatron_patch.ops import backends, token_decoder
from megatron_patch.ops.triton import decoder
from tests.ops.decoder_steps import (
    DEVICE,
    NUMBERS,
    SMALL,
    WIDE,
    WIDER,
    WIDEST,
    build,
    check,
    check_widths,
    states_of,
    tensors_of,
    two_runs,
)

GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def no_other_kernel(monkeypatch):
    module = backends.REGISTRY["token_decoder"]["cuda"].module
    monkeypatch.setitem(backends._failures, module, "is not installed")
    monkeypatch.setattr(backends, "_decided", {})


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, dict(decoder_embed_dim=96, decoder_attention_heads=6, glu_dim=200)),
        # Rows that begin at no multiple of 16 bytes.
        (torch.bfloat16, dict(decoder_embed_dim=36, glu_dim=50, vocab_size=301)),
        (torch.float16, dict(norm_type="rmsnorm")),
        (torch.float32, dict(norm_type="rmsnorm", bias=True)),
        (torch.float32, dict(self_augmentation=False, conv_width=2)),
        (torch.float32, dict(expand_k=1.0)),
        (torch.float32, dict(conv_width=1, no_scale_embedding=False, tau=1.0)),
        (torch.bfloat16, dict(no_scale_embedding=False, tie_word_embeddings=True)),
    ],
)
def test_a_step_is_the_models_own(dtype, options):
    check(decoder.Decoder, dtype, **{**SMALL, **options})


@pytest.mark.parametrize(
    ("dtype", "heads", "K", "V"),
    [
        (torch.float32, 3, 16, 16),
        (torch.float32, 2, 32, 16),
        (torch.float32, 3, 5, 16),
        (torch.bfloat16, 2, 16, 16),
        (torch.float32, 1, 64, 64),
    ],
)
def test_keys_of_any_width(dtype, heads, K, V):
    check_widths(decoder.Decoder, dtype, 1e-5 if dtype == torch.float32 else 1e-2, heads, K, V, 80)


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "K", "V"), [(8, 128, 128), (16, 64, 64), (16, 128, 64)])
def test_wide_keys(dtype, heads, K, V):
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    check_widths(decoder.Decoder, dtype, tolerance, heads, K, V, 2816)


def test_layers_of_several_shapes():
    (one, other), *others = tensors_of(torch.float32, 2, 16, 16, 80)
    (wider,), *_ = tensors_of(torch.float32, 2, 32, 16, 80, layers=1)
    assert token_decoder([one, other], *others, **NUMBERS) is not None
    assert token_decoder([one, wider], *others, **NUMBERS) is None
    assert token_decoder([one, {**other, "aug": None}], *others, **NUMBERS) is None


def test_shares_larger_than_a_programs_registers(monkeypatch):
    """Every weight is then read in several turns."""
    monkeypatch.setattr(decoder, "BYTES", 1)
    monkeypatch.setattr(decoder, "PROGRAMS_INTERPRETED", 3)
    check(decoder.Decoder, torch.float32, **SMALL)


def test_long_rows_are_shared_by_warps(monkeypatch):
    monkeypatch.setattr(decoder, "LONG_ROW", 64)
    check(decoder.Decoder, torch.float32, **SMALL)


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [WIDE, WIDER, WIDEST])
def test_widths_of_real_models(sizes, dtype):
    check(decoder.Decoder, dtype, **sizes)


def test_two_runs_give_equal_bits():
    assert all(map(torch.equal, *two_runs(torch.float32, **SMALL)))


def no_kernel(change, **sizes) -> bool:
    model, _ = build(torch.float32, **{**SMALL, **sizes})
    change(model)
    cache = MetaLACache(model.config)
    model(torch.zeros(1, 1, dtype=torch.long, device=DEVICE), past_key_values=cache)
    # In the order in which decoding asks.
    return _obstacle(model, model.device) is not None or _kernel(model, states_of(cache)) is None


def test_where_there_is_no_kernel():
    def bias_of_ones_own(model):
        model.lm_head.bias = torch.nn.Parameter(torch.ones(300, device=DEVICE))

    def transposed(model):
        weight = model.model.layers[0].channel_mixer.l1.weight
        weight.data = weight.data.T.contiguous().T

    def shifted(model):
        weight = model.lm_head.weight
        weight.data = torch.cat([weight.new_zeros(1), weight.data.flatten()])[1:].view_as(weight)

    def rows_for_more_tokens(model):
        weight = model.lm_head.weight
        weight.data = torch.cat([weight.data, weight.data[:4]])

    assert not no_kernel(lambda model: None)
    assert no_kernel(rows_for_more_tokens)
    assert no_kernel(bias_of_ones_own)
    assert no_kernel(transposed)
    assert no_kernel(shifted)
    assert no_kernel(lambda model: None, decoder_embed_dim=512, decoder_attention_heads=1)


def test_more_heads_than_programs(monkeypatch):
    monkeypatch.setattr(decoder, "_programs", lambda device: 2)
    assert no_kernel(lambda model: None)
