"""Random damage to every file that the converters read: a reader succeeds, or fails in one line."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from convert.command import ConvertError
from convert.export_record import check_model_export, check_record
from convert.hf_io import HFFolder
from convert.neox_reader import NeoXCheckpoint
from convert.neox_to_hf import neox_to_hf
from convert.tensor_table import tensor_table
from convert.tokenizer import find_tokenizer, read_tokenizer
from megatron_patch.architecture import SettingsError
from megatron_patch.architecture_neox import with_defaults
from megatron_patch.neox.yaml_config import merge_yaml_texts
from tests.convert.conftest import write_tokenizer
from tests.convert.synthetic import Model, write
from tests.convert.test_zero3 import deepspeed_objects, write_zero3  # noqa: F401  (a fixture)

BOUNDED = settings(
    max_examples=50,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TENSORS = st.sampled_from(
    [
        torch.zeros(3),
        torch.zeros(()),
        torch.zeros(0, 4),
        torch.zeros(32, 32, dtype=torch.float16),
        torch.ones(96, 32).t(),
        torch.ones(1).expand(96, 32),
        torch.arange(5),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, 2).to_sparse(),
        torch.empty(4, device="meta"),
        torch.nn.Parameter(torch.zeros(32)),
        torch.zeros(4, dtype=torch.float8_e4m3fn),
    ]
)
NUMBERS = st.one_of(
    st.integers(-3, 200), st.integers(), st.just(10**18), st.just(16**500), st.floats()
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20))


def nested(leaves: st.SearchStrategy, keys: st.SearchStrategy) -> st.SearchStrategy:
    return st.recursive(
        leaves,
        lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3),
        max_leaves=6,
    )


WORDS = st.text(max_size=8)
JSON = nested(PLAIN, WORDS)
STATES = nested(PLAIN | TENSORS, WORDS | st.integers(0, 9))


def refuses_in_one_line(read: Callable[[], object]) -> None:
    try:
        read()
    except (ConvertError, SettingsError) as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 10_000


def altered(data: st.DataObject, value: Any, others: st.SearchStrategy) -> Any:
    """Returns `value` with an element somewhere in it changed, removed or added."""
    if isinstance(value, (dict, list)) and value and data.draw(st.integers(0, 3)):
        changed = value.copy()
        place = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else [0]))
        what = data.draw(st.sampled_from(["alter"] * 6 + ["remove", "add"]))
        if what == "alter":
            changed[place] = altered(data, value[place], others)
        elif what == "remove":
            del changed[place]
        elif isinstance(value, dict):
            changed[data.draw(WORDS)] = data.draw(others)
        return changed
    return data.draw(others)


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Returns other bytes, or `content` with bytes cut off, changed or added."""
    what = data.draw(st.sampled_from(["other", "cut", "change", "change", "add"]))
    place = data.draw(st.integers(0, max(len(content) - 1, 0)))
    some = data.draw(st.binary(min_size=1, max_size=30))
    return {
        "other": some,
        "cut": content[:place],
        "change": content[:place] + some + content[place + len(some) :],
        "add": content[:place] + some + content[place:],
    }[what]


def changed_file(data: st.DataObject, path: Path) -> None:
    """Damages the bytes of a file, or the structure that it holds."""
    if data.draw(st.booleans()):
        path.write_bytes(damaged(data, path.read_bytes()))
    elif path.suffix in (".pt", ".bin"):
        states = torch.load(path, weights_only=False)
        torch.save(altered(data, dict(states), STATES), path)
    elif path.suffix == ".json":
        values = json.loads(path.read_text())
        text = json.dumps(altered(data, values, JSON))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif path.suffix == ".yml":
        values = yaml.safe_load(path.read_text())
        text = yaml.safe_dump(altered(data, values, JSON))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        text = data.draw(st.text(max_size=300) | st.just("..") | st.just("/dev/zero"))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))


def read_checkpoint(folder: Path) -> None:
    source = NeoXCheckpoint(folder)
    for rule in source.table:
        source.full(rule).float().sum()
    find_tokenizer(None, with_defaults(source.settings))


def read_model(folder: Path) -> None:
    source = HFFolder(folder)
    for rule in tensor_table(source.shape):
        source.full(rule).float().sum()


@pytest.fixture(scope="module")
def made(tmp_path_factory, deepspeed_objects) -> Path:  # noqa: F811
    """Folders of every kind that the converters read, by name."""
    folder = tmp_path_factory.mktemp("made")
    words = write_tokenizer(folder / "tokenizer.json", ("<|endoftext|>",))
    model = Model(attention=(1,))
    write(folder / "whole", model, 2, 0, words)
    write(folder / "pipeline", model, 2, 1, words)
    write_zero3(folder / "zero3", model, 2, words, deepspeed_objects)
    neox_to_hf(folder / "whole", folder / "hf")
    neox_to_hf(folder / "whole", folder / "shards", max_shard_bytes=10_000)
    shutil.copytree(folder / "hf", folder / "bin")
    (folder / "bin/model.safetensors").unlink()
    torch.save(load_file(folder / "hf/model.safetensors"), folder / "bin/pytorch_model.bin")
    return folder


@pytest.mark.parametrize("kind", ["whole", "pipeline", "zero3"])
@BOUNDED
@given(data=st.data())
def test_checkpoints(kind, made, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "neox"
        shutil.copytree(made / kind, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        changed_file(data, data.draw(st.sampled_from(files)))
        refuses_in_one_line(lambda: read_checkpoint(folder))


@pytest.mark.parametrize("kind", ["hf", "shards", "bin"])
@BOUNDED
@given(data=st.data(), with_record=st.booleans())
def test_models(kind, made, data, with_record):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "hf"
        shutil.copytree(made / kind, folder)
        if not with_record:  # with one, any change to the weights is refused
            (folder / "SHA256SUMS").unlink()
        files = [path for path in sorted(folder.iterdir()) if path.suffix != ".py"]
        changed_file(data, data.draw(st.sampled_from(files)))
        refuses_in_one_line(lambda: read_model(folder))
        refuses_in_one_line(lambda: read_tokenizer(folder / "tokenizer.json"))
        refuses_in_one_line(lambda: check_record(folder))
        refuses_in_one_line(lambda: check_model_export(folder))


@settings(BOUNDED, max_examples=30)
@given(data=st.data())
def test_folders_of_tokenizers(made, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tokenizer"
        folder.mkdir()
        files = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        for file in files:
            shutil.copy(made / "hf" / file, folder)
        changed_file(data, folder / data.draw(st.sampled_from(files)))
        refuses_in_one_line(lambda: read_tokenizer(folder))


@settings(BOUNDED, max_examples=200)
@given(text=st.text(alphabet="ab:-[]{}*&!<>?|'\"#,0x1e.\n \t\0é") | st.text())
def test_texts_as_settings(text):
    refuses_in_one_line(lambda: merge_yaml_texts({"a.yml": text}))
