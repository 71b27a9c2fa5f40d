"""The .bin / .idx reader and writer, alone and against GPT-NeoX's own."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_patch.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetError,
    IndexedDatasetWriter,
    bin_path,
    idx_path,
)

LARGE_VOCABULARY = 70_000  # four bytes a token


def write(prefix, documents, vocab_size=512):
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "data", [[1, 2, 3], [], list(range(500))])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(data=st.data(), vocab_size=st.sampled_from([2, 512, 65499, 65500, LARGE_VOCABULARY]))
def test_what_was_written_is_read(tmp_path, data, vocab_size):
    documents = data.draw(
        st.lists(st.lists(st.integers(0, vocab_size - 1), max_size=40), min_size=1).filter(any)
    )
    dataset = IndexedDataset(write(tmp_path / "data", documents, vocab_size))
    assert [list(document) for document in dataset] == documents
    assert list(dataset.sizes) == [len(document) for document in documents]
    assert list(dataset.document_index) == list(range(len(documents) + 1))
    assert dataset.dtype == ("uint16" if vocab_size < 65500 else "int32")
    assert len(dataset) == len(documents)


def test_part_of_a_document(prefix):
    dataset = IndexedDataset(prefix)
    assert list(dataset.get(2, 10, 13)) == [10, 11, 12]
    assert list(dataset.get(2, 498)) == [498, 499]
    assert list(dataset.get(1)) == []


@pytest.mark.parametrize("token", [-1, 512, 70_000])
def test_tokens_outside_the_vocabulary_are_refused(tmp_path, token):
    with pytest.raises(
        IndexedDatasetError, match=r"document 1: found tokens from .* wanted 0 to 511"
    ):
        write(tmp_path / "data", [[1], [5, token]])
    assert not list(tmp_path.iterdir())


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(IndexedDatasetError, match="no tokens"):
        write(tmp_path / "data", [[]])
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writer_leaves_the_old_pair(prefix):
    with pytest.raises(KeyboardInterrupt):
        with IndexedDatasetWriter(prefix, 512) as writer:
            writer.add_document([7])
            raise KeyboardInterrupt
    assert len(IndexedDataset(prefix)) == 3
    assert len(list(prefix.parent.iterdir())) == 2


def test_missing_files_are_named(tmp_path, prefix):
    with pytest.raises(FileNotFoundError, match="nothing.idx"):
        IndexedDataset(tmp_path / "nothing")
    bin_path(prefix).unlink()
    with pytest.raises(FileNotFoundError, match="data.bin"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"TNTIDX\x00\x00" + raw[8:], "data.idx: found .* at its start, wanted"),
        (lambda raw: raw[:20], "data.idx: truncated: found 20 bytes"),
        (lambda raw: raw[:-1], "data.idx: truncated: found .* wanted"),
        (lambda raw: raw[:9] + struct.pack("<Q", 2) + raw[17:], "found version 2, wanted 1"),
        (lambda raw: raw[:17] + b"\x09" + raw[18:], "unknown token type 9"),
        (lambda raw: raw[:34] + struct.pack("<i", -1) + raw[38:], "negative sizes"),
        (lambda raw: b"", "at its start"),
    ],
)
def test_a_damaged_index_is_refused(prefix, damage, message):
    path = idx_path(prefix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(IndexedDatasetError, match=message):
        IndexedDataset(prefix)


def test_a_truncated_token_file_is_refused(prefix):
    path = bin_path(prefix)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        IndexedDatasetError, match=r"data.bin: truncated: found 1005 .* wanted 1006"
    ):
        IndexedDataset(prefix)


NEOX_READS_AND_WRITES = """
import json, sys
import numpy as np
from megatron.data.indexed_dataset import make_builder, make_dataset

ours, theirs, vocab_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
dataset = make_dataset(ours, "mmap", skip_warmup=True)
documents = [dataset[i].tolist() for i in range(len(dataset))]
builder = make_builder(theirs + ".bin", "mmap", vocab_size=vocab_size)
for document in documents:
    builder.add_item(np.array(document, dtype=builder.dtype))
    builder.end_document()
builder.finalize(theirs + ".idx")
print("READ", json.dumps([documents, dataset.doc_idx.tolist()]))
"""


@pytest.mark.parametrize("vocab_size", [512, LARGE_VOCABULARY])
def test_gpt_neox_reads_and_writes_the_same_bytes(neox_checkout, tmp_path, vocab_size):
    rng = np.random.default_rng(0)
    documents = [rng.integers(vocab_size, size=size).tolist() for size in (3, 1, 700, 20)]
    ours = write(tmp_path / "ours", documents, vocab_size)
    theirs = tmp_path / "theirs"
    result = subprocess.run(
        [sys.executable, "-c", NEOX_READS_AND_WRITES, ours, theirs, str(vocab_size)],
        cwd=neox_checkout,
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(line for line in result.stdout.splitlines() if line.startswith("READ "))
    assert json.loads(line.removeprefix("READ ")) == [documents, list(range(5))]
    assert bin_path(ours).read_bytes() == bin_path(theirs).read_bytes()
    assert idx_path(ours).read_bytes() == idx_path(theirs).read_bytes()


def test_labels_may_be_below_zero(tmp_path):
    with IndexedDatasetWriter(tmp_path / "labels", 512, lowest=-100) as writer:
        writer.add_document([-100, 511])
        with pytest.raises(IndexedDatasetError, match="from -101 to 3, wanted -100 to 511"):
            writer.add_document([-101, 3])
    dataset = IndexedDataset(tmp_path / "labels")
    assert dataset[0].tolist() == [-100, 511] and dataset.dtype == np.dtype("<i4")
