"""MetaLACache: constant size, exact continuation, reordering, saving and loading."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from transformers import Cache, DynamicCache

from megatron_patch.hf import MetaLACache
from tests.hf.conftest import HYBRID, KINDS, same


def same_states(left: MetaLACache, right: MetaLACache) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left.layers, right.layers, strict=True):
        for (name, tensor), (_, expected) in zip(one.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(
                tensor, expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 4, 2], [2, 10], [11, 1], [1, 1, 10]])
@pytest.mark.parametrize(
    "changes",
    [{}, {"conv_width": 1}, {"conv_width": 6}, HYBRID],
    ids=["metala", "width 1", "width 6", "hybrid"],
)
def test_any_split_equals_one_call(tiny_model, tokens, pieces, changes):
    model, input_ids = tiny_model(torch.float64, **changes), tokens(3, 12)
    whole = model(input_ids)
    cache, logits = MetaLACache(model.config), []
    for piece in input_ids.split(pieces, dim=1):
        output = model(piece, past_key_values=cache)
        assert output.past_key_values is cache
        logits.append(output.logits)
    same(torch.cat(logits, dim=1), whole.logits)
    assert cache.get_seq_length() == whole.past_key_values.get_seq_length() == 12
    same_states(cache, whole.past_key_values)


def test_bytes_do_not_grow(tiny_model, tokens):
    model = tiny_model()

    def held(cache: MetaLACache) -> int:
        """Returns the bytes of the storages, which would be larger behind views of long tensors."""
        return sum(
            t.untyped_storage().nbytes() for layer in cache.layers for _, t in layer.tensors()
        )

    cache = model(tokens(2, 5)).past_key_values
    size = cache.nbytes
    assert size == held(cache) == 2 * 2 * 4 * (32 * 3 + 2 * 8 * 16)  # layers, batch, bytes, numbers
    for time in (1, 300, 1):
        cache = model(tokens(2, time), past_key_values=cache).past_key_values
        assert cache.nbytes == held(cache) == size
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, :40] = 0
    cache = model(tokens(2, 100), attention_mask=mask, past_key_values=cache).past_key_values
    assert cache.nbytes == held(cache) == size


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("time", [1, 5])
def test_without_gradients_states_are_written_in_place(tiny_model, tokens, padded, time):
    model, ids = tiny_model(torch.float64), tokens(2, time, seed=1)
    mask = torch.ones(2, time)
    mask[1, 0] = 0
    how = dict(attention_mask=mask) if padded else {}
    with torch.no_grad():
        cache = model(tokens(2, 6)).past_key_values
        fork, held = copy.deepcopy(cache), [t for layer in cache.layers for _, t in layer.tensors()]
        output = model(ids, past_key_values=cache, **how)
    now = [t for layer in cache.layers for _, t in layer.tensors()]
    assert all(one is other for one, other in zip(held, now, strict=True))

    before = copy.deepcopy(fork)
    held = [t for layer in fork.layers for _, t in layer.tensors()]
    expected = model(ids, past_key_values=fork, **how)  # with gradients, states are new tensors
    same(output.logits, expected.logits)
    same_states(cache, fork)
    for tensor, kept in zip(held, (t for y in before.layers for _, t in y.tensors()), strict=True):
        assert torch.equal(tensor, kept)


def test_a_state_that_a_gradient_needs_is_not_overwritten(tiny_model, tokens):
    model = tiny_model(torch.float64)
    cache = model(tokens(1, 5)).past_key_values
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    loss = model(tokens(1, 2), past_key_values=cache).logits.square().sum()
    expected = torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)[0]
    with torch.no_grad():
        model(tokens(1, 3), past_key_values=fork)
    assert torch.equal(torch.autograd.grad(loss, model.lm_head.weight)[0], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("trained", ["", "q_proj"], ids=["all", "queries"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("time", [1, 3])
def test_a_state_saved_for_other_gradients_is_not_overwritten(
    tiny_model, tokens, mode, trained, use_cache, time
):
    """The gradients of the queries need states that have no gradient themselves: those of a prefix
    read without gradients, or those that no trained weight reaches."""
    model = tiny_model(torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    with mode():
        cache = model(tokens(1, 5)).past_key_values
    loss = model(tokens(1, time), past_key_values=cache, use_cache=use_cache).logits.square().sum()
    weight = model.model.layers[0].token_mixer.q_proj.weight
    expected = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    with mode():
        model(tokens(1, time), past_key_values=cache)
    assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_states(tiny_model, tokens, dtype):
    layer = tiny_model(dtype)(tokens(1, 5)).past_key_values.layers[0]
    assert layer.conv_states.dtype == dtype
    assert layer.recurrent_states.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )


def test_without_use_cache_the_cache_is_only_read(tiny_model, tokens):
    model, input_ids = tiny_model(torch.float64), tokens(1, 6)
    cache = model(input_ids).past_key_values
    before = copy.deepcopy(cache)
    with_cache = model(input_ids, past_key_values=cache, use_cache=False)
    assert with_cache.past_key_values is None
    same_states(cache, before)  # read, not written
    assert cache.get_seq_length() == 6
    assert model(input_ids, use_cache=False).past_key_values is None
    again = model(input_ids, past_key_values=before)
    same(again.logits, with_cache.logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_rows_are_reordered_repeated_and_selected(tiny_model, tokens, kind, padded):
    model = tiny_model(torch.float64, **KINDS[kind])
    first, second = tokens(3, 6), tokens(4, 2, seed=1)
    mask = torch.ones(3, 6, dtype=torch.long)
    if padded:
        mask[0, :4] = mask[2, 1:3] = 0
    cache = model(first, attention_mask=mask).past_key_values

    def whole(rows):
        """Logits of the second call's tokens, each row alone and without its padding."""
        logits = []
        for row, new in zip(rows, second, strict=False):
            ids = torch.cat([first[row, mask[row].bool()], new])[None]
            logits.append(model(ids).logits[0, -2:])
        return torch.stack(logits)

    fork = copy.deepcopy(cache)
    fork.reorder_cache(torch.tensor([2, 0, 0]))
    same(model(second[:3], past_key_values=fork).logits, whole([2, 0, 0]))

    fork = copy.deepcopy(cache)
    fork.batch_select_indices(torch.tensor([1, 2]))
    fork.batch_repeat_interleave(2)
    assert fork.batch_size == 4
    same(model(second, past_key_values=fork).logits, whole([1, 1, 2, 2]))
    assert cache.batch_size == 3  # forks share nothing


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(tiny_model, tokens, tmp_path, kind):
    model, input_ids = tiny_model(torch.bfloat16, **KINDS[kind]), tokens(2, 9)
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    cache = model(input_ids, attention_mask=mask).past_key_values
    cache.save(tmp_path / "state.safetensors")
    loaded = MetaLACache.load(tmp_path / "state.safetensors")
    assert (len(loaded), loaded.get_seq_length(), loaded.nbytes) == (2, 9, cache.nbytes)
    new = tokens(2, 3, seed=1)
    expected = model(new, past_key_values=cache).logits
    assert torch.equal(model(new, past_key_values=loaded).logits, expected)

    empty = MetaLACache(model.config)
    empty.save(tmp_path / "empty.safetensors")
    resumed = MetaLACache.load(tmp_path / "empty.safetensors")
    assert resumed.get_seq_length() == 0
    assert torch.equal(model(new, past_key_values=resumed).logits, model(new).logits)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: not a saved MetaLACache"):
        MetaLACache.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_reset(tiny_model, tokens, kind):
    model, input_ids = tiny_model(torch.float64, **KINDS[kind]), tokens(2, 5)
    mask = torch.tensor([[0, 1, 1, 1]] * 3)
    cache = model(tokens(3, 4, seed=1), attention_mask=mask).past_key_values
    cache.reset()
    assert (cache.get_seq_length(), cache.has_previous_state(), cache.nbytes) == (0, False, 0)
    same(model(input_ids, past_key_values=cache).logits, model(input_ids).logits)


def test_a_hybrid_keeps_keys_and_values_beside_the_state(tiny_model, tokens):
    model = tiny_model(**HYBRID)
    cache = model(tokens(2, 5)).past_key_values
    state = 2 * 4 * (32 * 3 + 2 * 8 * 16)  # batch, bytes, numbers
    token = 2 * 4 * 2 * 16  # batch, bytes, key and value of one head
    assert cache.nbytes == state + 5 * token
    for time in (1, 30):
        cache = model(tokens(2, time), past_key_values=cache).past_key_values
    assert cache.nbytes == state + 36 * token
    made_without_config = MetaLACache()
    model(tokens(2, 36), past_key_values=made_without_config)
    assert made_without_config.nbytes == cache.nbytes


def test_transformers_cache_interface(tiny_config):
    cache = MetaLACache(tiny_config())
    assert len(cache) == 2 and cache.batch_size == -1 and not cache.is_compileable
    assert cache.get_max_length() in (-1, None) and cache.get_max_cache_shape() in (-1, None)
    assert "2 layers, 0 tokens" in repr(cache)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="appends no keys and values"):
        cache.update(None, None, 0)


def test_transformers_5_names_of_recurrent_caches(tiny_model, tokens):
    """The methods of transformers' own caches for "linear attention" layers."""
    model = tiny_model()
    cache = MetaLACache(model.config)
    assert cache.get_conv_state(1) is cache.get_recurrent_state(1) is None
    model(tokens(3, 4), past_key_values=cache)
    layer = cache.layers[1]
    assert cache.get_conv_state(1) is layer.conv_states
    assert cache.get_recurrent_state(1, state_idx=0) is layer.recurrent_states
    assert cache.is_linear == [True, True] and cache.has_previous_state(1)
    assert cache.batch_size == 3 and cache.get_mask_sizes(2, 0) == (6, 0)
    for name in ("get_max_length", "get_max_cache_shape"):  # abstract, or in the way of `generate`
        assert name in vars(MetaLACache)
    if hasattr(Cache, "is_sliding"):
        assert not any(cache.is_sliding) and not cache.is_initialized and not cache.is_croppable


def test_wrong_caches_are_refused(tiny_model, tokens):
    model = tiny_model()
    with pytest.raises(
        ValueError, match="^past_key_values: found a DynamicCache, wanted a MetaLACache"
    ):
        model(tokens(1, 3), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="^past_key_values: found a tuple, wanted a MetaLACache"):
        model(tokens(1, 3), past_key_values=((None, None),))
    cache = model(tokens(2, 3)).past_key_values
    with pytest.raises(
        ValueError, match="^past_key_values: found the states of 2 sequences, wanted 3"
    ):
        model(tokens(3, 3), past_key_values=cache)
    deeper = tiny_model(decoder_layers=3)
    for one, other in ((model, deeper), (deeper, model)):
        n, wanted = one.config.num_hidden_layers, other.config.num_hidden_layers
        for cache in (one(tokens(1, 3)).past_key_values, MetaLACache(one.config)):
            with pytest.raises(
                ValueError, match=f"^past_key_values: found a cache of {n} layers, wanted {wanted}"
            ):
                other(tokens(1, 3), past_key_values=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_first_call_leaves_nothing(tiny_model, tokens, kind):
    """For example, a prompt that did not fit into memory is read again in pieces."""
    model, ids = tiny_model(torch.float64, **KINDS[kind]), tokens(2, 6)

    def interrupt(*_):
        raise MemoryError

    cache = MetaLACache(model.config)
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(MemoryError):
        model(ids, past_key_values=cache)
    hook.remove()
    first, second = (model(piece, past_key_values=cache).logits for piece in ids.split(3, dim=1))
    same(torch.cat([first, second], dim=1), model(ids).logits)
