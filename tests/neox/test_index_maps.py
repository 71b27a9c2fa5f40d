"""Samples are those of the data that are there, in whatever way they came to their prefix."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_patch.architecture import SettingsError
from megatron_patch.indexed_dataset import IndexedDatasetWriter
from megatron_patch.neox.upstream_fixes.data import _check_some_fit
from tests.neox.training import settings

DOCUMENTS = 40
PARTS = ("train", "valid", "test")
READ = """
from megatron.data.data_utils import build_train_valid_test_data_loaders
loaders = build_train_valid_test_data_loaders(neox_args)
before = torch.get_rng_state()
samples = {name: [batch["text"].tolist() for batch in loader] for name, loader in loaders.items()}
answer([samples, torch.equal(before, torch.get_rng_state())])
"""


@pytest.fixture
def read(in_neox, tokenizer_file):
    def read_samples(prefix: Path | None, **changes) -> tuple[dict[str, np.ndarray], bool]:
        """Samples [n, tokens] of each part; whether the ranks' shared generator is untouched."""
        config = settings(prefix, tokenizer_file, train_iters=4, eval_interval=4, eval_iters=2)
        samples, is_untouched = in_neox({**config, **changes}, READ)
        return {name: np.concatenate(batches) for name, batches in samples.items()}, is_untouched

    return read_samples


def write(prefix: Path, seed: int) -> None:
    """Documents of lengths that the seed gives; the tokens of each are its number, from 1 on."""
    sizes = np.random.default_rng(seed).integers(20, 60, DOCUMENTS)
    with IndexedDatasetWriter(prefix, vocab_size=512) as writer:
        for number, size in enumerate(sizes, 1):
            writer.add_document([number] * size)


def write_labels(prefix: Path, seed: int, left_out: Collection[int]) -> None:
    """The labels of the documents that `write` writes, -100 for all tokens of those left out."""
    none = 69_999
    sizes = np.random.default_rng(seed).integers(20, 60, DOCUMENTS)
    with IndexedDatasetWriter(prefix, vocab_size=70_000) as writer:
        for number, size in enumerate(sizes, 1):
            writer.add_document([none if number in left_out else number] * size)
    labels = np.fromfile(f"{prefix}.bin", "<i4")
    labels[labels == none] = -100
    labels.tofile(f"{prefix}.bin")


def blend(prefix: Path) -> dict:
    return {
        "data_path": None,
        **{f"{part}_data_paths": [f"{prefix}0", f"{prefix}1"] for part in PARTS},
    }


def equal(one: dict, other: dict) -> bool:
    return all(np.array_equal(one[part], other[part]) for part in PARTS)


@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow"])
def test_data_prepared_again_are_read(read, tmp_path, packing):
    changes = {"pack_impl": packing, "split": "60,20,20", "eod_mask_loss": True}
    write(tmp_path / "text", seed=0)
    first, is_untouched = read(tmp_path / "text", **changes)
    assert is_untouched  # only one tensor-parallel rank reads
    for name in ("text", "fresh"):
        write(tmp_path / name, seed=1)
    again, _ = read(tmp_path / "text", **changes)
    assert equal(again, read(tmp_path / "fresh", **changes)[0])
    assert not equal(again, first)


def test_blended_data_prepared_again_are_read(read, tmp_path):
    for seed, names in ((0, ["text"]), (2, ["text", "fresh"])):
        for name in names:
            write(tmp_path / f"{name}0", seed)
            write(tmp_path / f"{name}1", seed + 1)
        samples = [read(None, **blend(tmp_path / name))[0] for name in names]
    assert equal(*samples)


def test_gpt_neox_itself_still_reads_what_was_there(read, tmp_path):
    """The fault, without metala layers. That of the generator too."""
    changes = {"attention_config": None, "metala": None, "norm": "rmsnorm", "split": "60,20,20"}
    write(tmp_path / "text", seed=0)
    _, is_untouched = read(tmp_path / "text", **changes)
    assert not is_untouched
    for name in ("text", "fresh"):
        write(tmp_path / name, seed=1)
    again, _ = read(tmp_path / "text", **changes)
    assert not equal(again, read(tmp_path / "fresh", **changes)[0])


@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow"])
def test_no_document_is_in_two_parts(read, tmp_path, packing):
    """After `split` was changed, and with the packing that counts from the first document."""
    write(tmp_path / "text", seed=0)
    for split in ("60,20,20", "20,20,60"):
        changes = {"split": split, "pack_impl": packing, "eod_mask_loss": True}
        samples, _ = read(tmp_path / "text", **changes)
        # Padding is 0.
        train, valid, test = (set(samples[part].ravel().tolist()) - {0} for part in PARTS)
        assert 0 < max(train) < min(valid) <= max(valid) < min(test)


def test_other_labels_make_other_samples(read, tmp_path):
    """Documents without labels are left out."""
    changes = {**blend(tmp_path / "text"), "pack_impl": "pack_until_overflow"}
    for part in PARTS:
        changes[f"{part}_label_data_paths"] = [f"{tmp_path}/label0", f"{tmp_path}/label1"]
    for i in (0, 1):
        write(tmp_path / f"text{i}", seed=i)
    for left_out in (range(2, 21), range(21, 41)):  # padding is 1
        for i in (0, 1):
            write_labels(tmp_path / f"label{i}", i, left_out)
        samples, _ = read(None, **changes)
        assert not set(samples["train"].ravel().tolist()) & set(left_out)


def test_an_epoch_of_several_data_sets_is_each_sample_once(in_neox, tokenizer_file, tmp_path):
    for i, documents in enumerate((60, 4)):
        with IndexedDatasetWriter(tmp_path / f"text{i}", vocab_size=512) as writer:
            for document in range(documents):
                writer.add_document([document] * 5)
    changes = {"train_iters": None, "train_epochs": 1, "eval_iters": 0, **blend(tmp_path / "text")}
    one = {"seq_length": 4, "max_position_embeddings": 4, "train_micro_batch_size_per_gpu": 1}
    code = """
    from megatron.data.data_utils import build_train_valid_test_data_loaders
    dataset = build_train_valid_test_data_loaders(neox_args)["train"].dataset
    drawn = [*zip(dataset.dataset_index.tolist(), dataset.dataset_sample_index.tolist())]
    wanted = [(i, j) for i, part in enumerate(dataset.datasets) for j in range(len(part))]
    answer([len(drawn), sorted(drawn) == wanted, [i for i, _ in drawn]])
    """
    config = {**settings(None, tokenizer_file), **changes, **one}
    number, are_all, datasets = in_neox(config, code)
    assert number > 60 and are_all
    few = [place for place, i in enumerate(datasets) if i == 1]
    assert np.ptp(np.diff(few)) <= 1  # evenly spread


FAILING = """
from megatron.data.data_utils import build_train_valid_test_data_loaders
from megatron_patch.architecture import SettingsError
try:
    build_train_valid_test_data_loaders(neox_args)
except SettingsError as error:
    answer(str(error))
"""


@pytest.mark.parametrize("packing", ["unpacked", "pack_until_overflow"])
def test_a_data_set_without_labels_is_refused(in_neox, tokenizer_file, tmp_path, packing):
    """GPT-NeoX would look for a document for ever."""
    text, labels = f"{tmp_path}/text", f"{tmp_path}/label"
    write(text, seed=0)
    write_labels(labels, 0, left_out=range(1, DOCUMENTS + 1))
    config = settings(None, tokenizer_file, data_path=None, pack_impl=packing)
    for part in PARTS:
        config |= {f"{part}_data_paths": [text], f"{part}_label_data_paths": [labels]}
    found = in_neox(config, FAILING)
    assert found == f"{text}: found no document that has labels and fits a sample"


@pytest.mark.parametrize(
    ("sizes", "labels", "is_found"),
    [
        ([(3, 3), (9, 3)], [(1, -100), (1, 1)], False),  # no label; too long
        ([(3, 3), (3, 3)], [(1, -100), (1, 1)], True),
        ([(3, 9), (3, 9)], [(1, 1), (1, 1)], False),
    ],
)
def test_both_documents_of_a_pair_must_do(sizes, labels, is_found):
    values = {"documents": range(2), "seq_length": 4, "allow_chopped": False}
    for sign, found, label in zip(
        ("pos", "neg"), zip(*sizes, strict=True), zip(*labels, strict=True), strict=True
    ):
        data = [np.full(n, x) for n, x in zip(found, label, strict=True)]
        values |= {
            f"{sign}_sizes": found,
            f"{sign}_label_dataset": SimpleNamespace(get=data.__getitem__),
        }
    if is_found:
        _check_some_fit(values, "pairs")
        return
    with pytest.raises(SettingsError, match="pairs: found no document"):
        _check_some_fit(values, "pairs")
