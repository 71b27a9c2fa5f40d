"""The Trainer's samples are GPT-NeoX's, in GPT-NeoX's order."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.architecture import SettingsError
from megatron_patch.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_patch.trainer.samples import (
    BlendedSamples,
    LoadedSamples,
    PackedSamples,
    build_samples,
    split_documents,
)
from megatron_patch.trainer.settings import read_settings


class Documents:
    """Documents in memory, whose tokens are 0, 1, 2, ..."""

    def __init__(self, sizes):
        self.sizes = np.asarray(sizes, np.int32)
        self.starts = np.cumsum(self.sizes) - self.sizes

    def get(self, index, start, stop):
        return np.arange(start, stop) + self.starts[index]


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    seq_length=st.integers(1, 7),
    wanted=st.integers(0, 30),
    seed=st.integers(0, 3),
)
def test_every_sample_is_a_stretch_of_the_shuffled_stream(sizes, seq_length, wanted, seed):
    documents = Documents(sizes)
    samples = PackedSamples(documents, np.arange(len(sizes)), seq_length, wanted, seed)
    number = len(samples._order)
    assert number >= wanted
    assert len(samples) == max(0, number - 1)  # GPT-NeoX's data set leaves the last one out
    stream = np.concatenate([documents.get(d, 0, sizes[d]) for d in samples._documents])
    starts = []
    for sample in (samples[i] for i in range(number)):
        start = int(samples._order[len(starts)]) * seq_length
        starts.append(start)
        assert sample["input_ids"].tolist() == stream[start : start + seq_length].tolist()
        assert sample["labels"].tolist() == stream[start + 1 : start + seq_length + 1].tolist()
    assert sorted(starts) == list(range(0, len(starts) * seq_length, seq_length))


def test_documents_without_tokens_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        PackedSamples(Documents([0, 0]), np.arange(2), 4, 1, 0)


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        ("969,30,1", [62, 2, 0]),
        ("80/20", [51, 13, 0]),
        ("1", [64, 0, 0]),
        ("1, 1, 1", [22, 21, 21]),
        ("0,1,0", [0, 64, 0]),
    ],
)
def test_split(split, sizes):
    parts = split_documents(split, 64)
    assert [len(part) for part in parts] == sizes
    assert np.concatenate(parts).tolist() == list(range(64))


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,-1,1"])
def test_a_bad_split_is_refused(split):
    with pytest.raises(SettingsError, match="split: found .*, wanted three numbers"):
        split_documents(split, 64)


def test_blending_keeps_to_the_weights():
    parts = [[f"{name}{i}" for i in range(60)] for name in "ab"]
    samples = BlendedSamples(parts, [0.75, 0.25], 40)
    drawn = [samples[i] for i in range(40)]
    for number in (4, 20, 40):
        assert abs(sum(name[0] == "a" for name in drawn[:number]) - 0.75 * number) <= 1
    assert [name for name in drawn if name[0] == "b"] == parts[1][:10]


def test_separate_data_paths(small_run, tmp_path):
    for name, token in (("a", 1), ("b", 2), ("valid", 3)):
        with IndexedDatasetWriter(tmp_path / name, 512) as writer:
            writer.add_document([token] * 100)
    config = small_run(
        data_path=None,
        train_data_paths=[str(tmp_path / "a"), str(tmp_path / "b")],
        train_data_weights=[1.0, 3.0],
        valid_data_paths=[str(tmp_path / "valid")],
    )
    train, valid = build_samples(read_settings([config])[0], world_size=1)
    assert len(train) == 16 * 4
    drawn = [int(train[i]["input_ids"][0]) for i in range(len(train))]
    assert drawn.count(1) == 16 and drawn.count(2) == 48
    assert set(valid(0)[0]["labels"].tolist()) == {3}


def test_evaluations_go_on_and_begin_again_as_gpt_neoxs_loader():
    """Ten samples, batches of three: GPT-NeoX drops the tenth and repeats its list of batches."""
    loaded = [LoadedSamples(range(10), 3, 6 * number, 6) for number in range(3)]
    assert [[part[i] for i in range(6)] for part in loaded] == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 0, 1, 2],
        [3, 4, 5, 6, 7, 8],
    ]


def test_a_missing_data_set_is_named(small_run):
    settings, _ = read_settings([small_run(data_path="no/such")])
    with pytest.raises(SettingsError, match="data_path: no/such.idx: no such file"):
        build_samples(settings, world_size=1)


# Builds a GPT2Dataset without its compiled helper and without torch.distributed.
NEOX_SAMPLES = """
import sys
import numpy as np
from megatron.data import gpt2_dataset as neox
from megatron.data.data_utils import get_train_valid_test_split_
from megatron.data.indexed_dataset import make_dataset

prefix, output, split, seq_length, wanted, seed = sys.argv[1:]
seq_length, wanted, seed = int(seq_length), int(wanted), int(seed)
data = make_dataset(prefix, "mmap", skip_warmup=True)
bounds = get_train_valid_test_split_(split, len(data))
documents = np.arange(bounds[0], bounds[1], dtype=np.int32)
tokens = neox._num_tokens(documents, data.sizes)
epochs = neox._num_epochs(tokens, seq_length, wanted)
rng = np.random.RandomState(seed=seed)
dataset = neox.GPT2Dataset("", prefix, documents, data, 0, 0, seq_length, seed,
                           build_index_mappings=False)
dataset.doc_idx = neox._build_doc_idx(documents, epochs, rng)
dataset.sample_idx = neox._build_sample_idx(
    data.sizes, dataset.doc_idx, seq_length, epochs, tokens)
dataset.shuffle_idx = neox._build_shuffle_idx(len(dataset.sample_idx) - 1, rng)
np.save(output, np.stack([dataset[i]["text"] for i in range(len(dataset.shuffle_idx))]))
"""


@pytest.mark.parametrize("wanted", [10, 2000])
def test_same_samples_as_gpt_neox(neox_checkout, token_data, tmp_path, wanted):
    seq_length, seed, split = 50, 1234, "80,15,5"
    output = tmp_path / "samples.npy"
    numbers = map(str, (seq_length, wanted, seed))
    subprocess.run(
        [sys.executable, "-c", NEOX_SAMPLES, token_data, output, split, *numbers],
        cwd=neox_checkout,
        check=True,
    )
    expected = np.load(output)
    dataset = IndexedDataset(token_data)
    documents = split_documents(split, len(dataset))[0]
    samples = PackedSamples(dataset, documents, seq_length, wanted, seed)
    assert len(samples) == len(expected) - 1  # GPT-NeoX's own length
    for index in range(len(expected)):
        sample = samples[index]
        assert sample["input_ids"].tolist() == expected[index, :-1].tolist()
        assert sample["labels"].tolist() == expected[index, 1:].tolist()
