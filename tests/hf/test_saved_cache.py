"""MetaLACache.load accepts the states that a model can have left, and names the fault of others."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_patch.hf import MetaLACache
from tests.hf.conftest import HYBRID

PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture
def saved(tiny_model, tokens, tmp_path):
    """A function that writes a hybrid's cache and returns the path. It takes changes of tensors
    (`None` removes one) and of metadata. Layer 0 has attention, layer 1 a state."""
    model = tiny_model(**HYBRID)
    cache = model(tokens(2, 5), attention_mask=PADDED).past_key_values
    cache.save(tmp_path / "whole")
    with safe_open(tmp_path / "whole", framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}

    def write(changes=None, **named):
        changed = {**tensors, **(changes or {})}
        path = tmp_path / "state"
        kept = {key: x.contiguous() for key, x in changed.items() if x is not None}
        save_file(kept, path, metadata={**metadata, **named})
        return path

    write.model, write.tensors = model, tensors
    return write


def with_nan(tensor):
    return torch.where(torch.arange(tensor.shape[-1]) == 1, torch.nan, tensor)


STATE, CONV = "layers.1.recurrent_states", "layers.1.conv_states"
WRONG = [
    (STATE, lambda x: None, "found none, wanted the state after 5 tokens"),
    (CONV, lambda x: None, "found none, wanted the state after 5 tokens"),
    ("layers.0.values", lambda x: None, "found none, wanted the state after 5 tokens"),
    (STATE, torch.Tensor.long, "found torch.int64, wanted torch.float32"),
    (STATE, torch.Tensor.bfloat16, "found torch.bfloat16, wanted torch.float32"),
    (CONV, torch.Tensor.int, "found torch.int32, wanted torch.bfloat16"),
    (STATE, with_nan, "found NaN or infinity, wanted numbers"),
    (CONV, lambda x: x * torch.inf, "found NaN or infinity, wanted numbers"),
    ("last_hidden", with_nan, r"found .*, wanted numbers \[2, 1, width\]"),
    ("last_hidden", lambda x: x[:1], r"found .*\[1, 1, 32\], wanted numbers \[2, 1, width\]"),
    (CONV, lambda x: x[:1], r"found shape \[1, 32, 3\], wanted \[2, 32, 3\]"),
    (STATE, lambda x: x[0], "found 3 dimensions, wanted 4"),
    (STATE, lambda x: x[0, 0, 0, 0], "found 0 dimensions, wanted 4"),
    ("layers.0.keys", lambda x: x[:, :, :4], r"found shape .*, wanted \[2, 1, 5, 16\]"),
    ("layers.0.values", lambda x: x[..., :8], r"found shape .*, wanted \[2, 1, 5, 16\]"),
    ("key_padding", torch.Tensor.int, r"found torch.int32 .*, wanted torch.bool \[2, up to 5\]"),
    ("key_padding", lambda x: x[:1], r"found torch.bool \[1, 5\], wanted torch.bool \[2, up to 5"),
    *(
        (name, lambda x: torch.zeros(2), "found what no cache of 2 layers has")
        for name in ("layers.0.reset", "layers.1.keys", "layers.2.keys", "layers.-1.keys")
    ),
    *(
        (name, lambda x: torch.zeros(2), "found what no cache of 2 layers has")
        for name in ("layers", "layers.0", "layers.x.keys", "__class__", "layers.01.keys", "")
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
def test_invalid_states_are_refused(saved, name, change, message):
    path = saved({name: change(saved.tensors.get(name))})
    with pytest.raises(ValueError, match=f"^{path}: {name}: {message}"):
        MetaLACache.load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"layers": "full_attention,mamba"}, "layers: found 'mamba', wanted linear_attention or "),
        ({"layers": "full_attention"}, "layers.1.conv_states: found what no cache of 1 layers"),
        ({"layers": "linear_attention,full_attention"}, "layers.0.keys: found what no cache of 2"),
        ({"seen_tokens": "-1"}, "seen_tokens: found '-1', wanted a number of tokens"),
        ({"seen_tokens": "1e3"}, "seen_tokens: found '1e3', wanted a number of tokens"),
        ({"seen_tokens": "9" * 5000}, "seen_tokens: found '9{40}', wanted a number of tokens"),
        ({"seen_tokens": "0"}, "layers.0.keys: found it before the first token"),
        ({"seen_tokens": "6"}, r"layers.0.keys: found shape .*, wanted \[2, 1, 6, 16\]"),
    ],
)
def test_invalid_metadata_is_refused(saved, metadata, message):
    path = saved(**metadata)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        MetaLACache.load(path)


def test_states_of_another_model_are_refused(saved, tiny_config, tiny_model, tokens):
    """`load` refuses them if it is given the configuration, otherwise the model does."""
    path = saved()
    cache = MetaLACache.load(path, config=saved.model.config)
    assert saved.model(tokens(2, 1), past_key_values=cache).logits.isfinite().all()
    for changes, message in (
        ({"decoder_layers": 3, "layer_types": None}, "found a cache of 2 layers, wanted 3"),
        ({"layer_types": None}, "layers.0: found a layer of full_attention, wanted linear"),
        ({"decoder_attention_heads": 4}, r"layers.0.keys: found \[2, 1, 5, 16\], wanted"),
        ({"conv_width": 3}, r"layers.1.conv_states: found \[2, 32, 3\], wanted \[2, 32, 2\]"),
        ({"expand_k": 1.0}, r"layers.1.recurrent_states: found \[2, 2, 8, 16\], wanted"),
    ):
        other = tiny_model(**{**HYBRID, **changes})
        with pytest.raises(ValueError, match=f"^{path}: {message}"):
            MetaLACache.load(path, config=other.config)
        with pytest.raises(ValueError, match=f"^past_key_values: {message}"):
            other(tokens(2, 1), past_key_values=MetaLACache.load(path))


def test_other_files_are_refused(tmp_path, saved):
    path = tmp_path / "state"
    for content in (b"", b"x", b"\xff" * 100, saved().read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: not a saved MetaLACache"):
            MetaLACache.load(path)
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=f"^{special}: not a saved MetaLACache: no regular"):
            MetaLACache.load(special)
    (tmp_path / "loop").symlink_to("loop")
    for missing in (tmp_path / "none", tmp_path / "loop", tmp_path / ("x" * 300)):
        with pytest.raises(OSError):
            MetaLACache.load(missing)


def test_a_file_is_replaced_once_the_new_one_is_complete(saved, monkeypatch, tmp_path):
    path, before = saved(), saved().read_bytes()
    (tmp_path / "link").symlink_to(path)

    def fail(tensors, name, metadata):
        open(name, "wb").write(b"half")
        raise OSError(28, "No space left on device", str(name))

    files = set(tmp_path.iterdir())
    cache = MetaLACache.load(path)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_patch.hf.cache_metala.save_file", fail)
        with pytest.raises(OSError, match="No space left"):
            cache.save(path)
    assert path.read_bytes() == before and set(tmp_path.iterdir()) == files
    path.write_bytes(b"other")
    cache.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and MetaLACache.load(path).nbytes == cache.nbytes


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_files_load_or_are_refused_in_one_line(saved, tokens, data):
    """Random tensors, names, metadata and bytes. A model can continue from whatever loads."""
    names = st.sampled_from([*saved.tensors, "layers.0.reset", "x", "layers.1.layer_type"])
    shapes = st.lists(st.integers(0, 5), max_size=4)
    kinds = st.sampled_from([torch.float32, torch.float16, torch.int8, torch.bool, torch.bfloat16])
    tensors = st.none() | st.builds(lambda s, k: torch.ones(s).to(k), shapes, kinds)
    metadata = st.dictionaries(
        st.sampled_from(["layers", "seen_tokens"]),
        st.sampled_from(["", ",", "5", "0", "linear_attention"]) | st.text(max_size=5),
    )
    path = saved(data.draw(st.dictionaries(names, tensors, max_size=2)), **data.draw(metadata))
    if data.draw(st.booleans()):
        raw = bytearray(path.read_bytes())
        for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=3)):
            raw[place] = data.draw(st.integers(0, 255))
        path.write_bytes(raw)
    try:
        cache = MetaLACache.load(path, config=saved.model.config)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))
    else:
        if cache.batch_size == 2:
            saved.model(tokens(2, 1), past_key_values=cache)
