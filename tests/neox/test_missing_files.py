"""A file that cannot be read or written, or is not what its setting says, ends a run with one line
that names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_patch.indexed_dataset import IndexedDatasetWriter
from megatron_patch.neox.upstream_fixes import data
from megatron_patch.neox.upstream_fixes.batches import endless

LOAD = """
import contextlib, io
from megatron import training
printed, code = io.StringIO(), None
try:
    with contextlib.redirect_stdout(printed):
        training.build_train_valid_test_data_loaders(neox_args=neox_args)
except SystemExit as end:
    code = end.code
answer([code, [line for line in printed.getvalue().splitlines() if line.startswith("MetaLA: ")]])
"""


def copy(data: Path, to: Path) -> Path:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", f"{to}{suffix}")
    return to


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", ["suffix", "no .bin", "short .bin", "short .idx", "no .idx"])
def test_data_that_cannot_be_read_are_named(in_neox, config, token_data, tmp_path, damage):
    """GPT-NeoX ends in an AttributeError: NoneType has no sizes."""
    prefix = copy(token_data, tmp_path / "text")
    files = {suffix: Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx")}
    part, _, suffix = damage.partition(" ")
    if part == "suffix":
        prefix = wrong = files[".bin"]
    else:
        wrong = files[suffix]
        wrong.unlink() if part == "no" else truncate(wrong)
    code, lines = in_neox({**config, "data_path": str(prefix)}, LOAD)
    assert code == 1
    assert len(lines) == 1 and lines[0].startswith(f"MetaLA: data_path: {wrong}")


def test_one_of_several_data_sets_is_named(in_neox, config, token_data):
    one = {f"{part}_data_paths": [str(token_data)] for part in ("train", "valid")}
    several = {"data_path": None, **one, "test_data_paths": [str(token_data), "/nowhere/text"]}
    code, lines = in_neox({**config, **several}, LOAD)
    wanted = "wanted /nowhere/text.idx and /nowhere/text.bin"
    assert lines == [f"MetaLA: test_data_paths: /nowhere/text.idx: no such file, {wanted}"]
    assert code == 1


LABELLED = {"text": [30, 20, 40], "label": [30, 20, 40], "few": [30, 20], "short": [30, 19, 40]}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """A folder of data sets; the names and lengths of their documents are LABELLED."""
    folder = tmp_path_factory.mktemp("labelled")
    for name, sizes in LABELLED.items():
        with IndexedDatasetWriter(folder / name, vocab_size=512, lowest=-100) as writer:
            for size in sizes:
                writer.add_document([1] * size)
    return folder


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, None),
        ({"train_label": "few"}, "train_label_data_paths: {}/few: found 2 documents, wanted as"),
        ({"valid_label": "short"}, "valid_label_data_paths: {}/short: found 19 labels in document"),
        ({"test_reward": "few"}, "test_reward_data_paths: {}/few: found 2 documents, wanted as ma"),
        ({"test_reward": "short"}, None),
        ({"pos_train": "text", "neg_train": "short"}, None),
        (
            {"pos_train": "text", "neg_train": "few"},
            "neg_train_data_paths: {0}/few: found 2 documents, wanted as many as the 3 of {0}/text",
        ),
    ],
)
def test_labels_belong_to_their_documents(labelled, changes, wrong):
    """GPT-NeoX reads the label of another token, without a word."""
    names = {"train": "text", "train_label": "label", "valid": "text", "valid_label": "label"}
    names |= {"test": "text", "test_label": "label", **changes}
    found = data._wrong_file(
        {f"{name}_data_paths": [str(labelled / file)] for name, file in names.items()}
    )
    assert found is None if wrong is None else found.startswith(wrong.format(labelled))


@pytest.mark.parametrize(
    ("token", "wanted"),
    [
        (512, "found the token 512, wanted one below 512, .*another tokenizer"),
        (-100, "found -100, wanted tokens: these may be labels"),
    ],
)
def test_tokens_without_a_row_end_the_run(token, wanted):
    loader = [{"text": torch.tensor([[0, 511]])}, {"text": torch.tensor([[0, token]])}]
    batches = endless(loader, vocab_size=512)
    assert next(batches) is loader[0]
    with pytest.raises(SystemExit, match=wanted):
        next(batches)


def test_an_index_map_appears_when_it_is_whole(tmp_path, monkeypatch):
    """A run that was killed, or has no more space, leaves nothing that a later one would read."""
    path, seen = tmp_path / "map.npy", []

    def save_half(file, array, **options):
        file.write(b"half")
        seen.append(path.exists())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(data, "_save", save_half)
        with pytest.raises(SystemExit, match="map.npy, an index map, cannot be written: No spa"):
            data._save_whole(str(path), np.arange(4))
    assert seen == [False] and not list(tmp_path.iterdir())
    data._save_whole(str(path), np.arange(4), allow_pickle=True)
    assert np.load(path, mmap_mode="r").tolist() == [0, 1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_index_maps_are_written_so(in_neox, config, token_data, tmp_path):
    prefix = copy(token_data, tmp_path / "text")
    code = """
    from megatron import training
    from megatron_patch.neox.upstream_fixes import data
    def refuse(file, array, **options):
        raise OSError(30, "Read-only file system")
    data._save = refuse
    try:
        training.pretrain(neox_args=neox_args)
    except SystemExit as end:
        answer(end.code)
    """
    line = in_neox({**config, "data_path": str(prefix)}, code)
    assert line.startswith(f"MetaLA: data: {prefix}_")
    assert "cannot be written: Read-only file system" in line


def test_a_tokenizer_that_cannot_be_read_is_named(in_neox, config, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    code = """
    codes = []
    for neox_args.vocab_file in (%r, "/nowhere.json"):
        try:
            neox_args.build_tokenizer()
        except SystemExit as end:
            codes.append(end.code)
    answer(codes)
    """
    damaged, missing = in_neox(config, code % str(tmp_path / "tokenizer.json"))
    start = "MetaLA: vocab_file: HFTokenizer cannot read"
    assert damaged.startswith(f"{start} {tmp_path}/tokenizer.json: ") and "\n" not in damaged
    assert missing.startswith(f"{start} /nowhere.json: No such file or directory")


def test_a_checkpoint_that_the_disk_does_not_take_is_named(in_neox, config, tmp_path):
    code = """
    from megatron import training
    from megatron_patch.neox.patching import swapped
    model, optimizer, scheduler, _ = training.setup_model_and_optimizer(neox_args)
    full = "[enforce fail at inline_container.cc:672] . unexpected pos 1225472 vs 1225360"
    codes, no_space = [], "No space left on device"
    others = RuntimeError("other"), ConnectionResetError("a rank left")
    for error in (OSError(28, no_space), RuntimeError(full), *others):
        def save(*args, **kwargs):
            raise error
        with swapped(torch, "save", save):
            try:
                training.save_checkpoint(neox_args, 1, model, optimizer, scheduler)
            except SystemExit as end:
                codes.append(end.code)
            except (RuntimeError, ConnectionError) as other:
                codes.append(str(other))
    answer(codes)
    """
    config = {**config, "save": str(tmp_path), "checkpoint_factor": 1}
    no_space, full, *others = in_neox(config, code)
    start = f"MetaLA: save: the checkpoint of iteration 1 was not written to {tmp_path}, which has "
    assert no_space.startswith(start) and "No space left on device" in no_space
    assert full.startswith(start) and "the disk takes no more; those before it are whole" in full
    assert others == ["other", "a rank left"]
