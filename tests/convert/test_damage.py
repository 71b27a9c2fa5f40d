"""Damaged files and diverged weights are found, and only exports are overwritten."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convert import export_record, files
from convert.command import ConvertError
from convert.hf_to_neox import hf_to_neox
from convert.neox_to_hf import neox_to_hf
from convert.reshape_neox import reshape_neox
from tests.convert.synthetic import Model, write
from tests.damage import flip_bit

MODEL = Model(attention=(1,))


@pytest.fixture(params=[0, 1], ids=["mp_rank files", "layer files"])
def neox(request, tmp_path, vocab_file) -> Path:
    write(tmp_path / "neox", MODEL, 2, request.param, vocab_file)
    return tmp_path / "neox"


@pytest.mark.parametrize("record", ["data/0", "data/1", "data.pkl"])
def test_a_flipped_bit_is_found(record, neox, tmp_path):
    file = [*neox.glob("*/layer_02-model_01*"), *neox.glob("*/mp_rank_01*")][0]
    flip_bit(file, record)
    for convert in (
        lambda: neox_to_hf(neox, tmp_path / "out"),
        lambda: reshape_neox(neox, tmp_path / "out", 1, 0),
    ):
        with pytest.raises(ConvertError, match=f"{file.name}: (damaged|truncated).*CRC-32"):
            convert()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["neox"]


def test_many_tensors_in_one_record_are_compared_once(tmp_path, vocab_file, monkeypatch):
    """ZeRO saves its tensors in this way, as views of one buffer."""
    write(tmp_path / "neox", MODEL, 1, 0, vocab_file)
    file = tmp_path / "neox/global_step7/mp_rank_00_model_states.pt"
    states = torch.load(file, weights_only=False)
    whole = torch.cat([tensor.flatten() for tensor in states["module"].values()])
    parts = whole.split([tensor.numel() for tensor in states["module"].values()])
    for (name, tensor), part in zip(list(states["module"].items()), parts, strict=True):
        states["module"][name] = part.view(tensor.shape)
    torch.save(states, file)
    monkeypatch.setattr("convert.neox_reader.MAPPED_BYTES", 1000)  # files are reopened often
    compared = []
    check = files.check_bytes

    def note(path, name, tensor):
        compared.append(tensor.untyped_storage().nbytes())
        check(path, name, tensor)

    monkeypatch.setattr("convert.neox_reader.check_bytes", note)
    neox_to_hf(tmp_path / "neox", tmp_path / "hf")
    assert compared == [whole.nbytes]
    flip_bit(file)
    with pytest.raises(ConvertError, match="damaged: layer 0: word_embeddings.weight"):
        neox_to_hf(tmp_path / "neox", tmp_path / "again")


def test_files_whose_crc_was_not_written(neox, tmp_path):
    for file in neox.glob("*/*.pt"):
        states = torch.load(file, weights_only=False)
        torch.save(states, file, _use_new_zipfile_serialization=False)
    neox_to_hf(neox, tmp_path / "hf")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_no_model_can_run_with(value, tmp_path, vocab_file):
    def change(rank, layers):
        layers[2]["mixer.out_proj.weight"][3, 5] = value

    write(tmp_path / "neox", MODEL, 2, 1, vocab_file, change=change)
    for convert, name in (
        (lambda: neox_to_hf(tmp_path / "neox", tmp_path / "out"), "out_proj.weight: 2 of 1024"),
        (lambda: reshape_neox(tmp_path / "neox", tmp_path / "out", 1, 0), "out_proj.*: 2 of 1024"),
    ):
        with pytest.raises(ConvertError, match=f"{name} numbers are NaN or infinite"):
            convert()
    assert not (tmp_path / "out").exists()


# checksums of an export


def test_an_export_tells_what_was_written(neox, run_main, tmp_path):
    folder = tmp_path / "hf"
    neox_to_hf(neox, folder, max_shard_bytes=20_000)
    hf_to_neox(folder, tmp_path / "imported", 2, 1)
    for written in (folder, tmp_path / "imported"):
        files = {str(p.relative_to(written)) for p in written.rglob("*") if p.is_file()}
        assert files == {*export_record.read_record(written), export_record.RECORD}
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=written, check=True)

    file = sorted(folder.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    load_file(file)  # safetensors does not notice
    with pytest.raises(ConvertError, match=f"{file.name}: damaged, or changed since it was exp"):
        hf_to_neox(folder, tmp_path / "again", 1, 0)
    for target, line in (
        (folder, f"command: {file}: damaged, or changed since it was exported, by SHA256SUMS"),
        (tmp_path, f"command: {tmp_path}: holds no SHA256SUMS of an export"),
    ):
        run = run_main(export_record.main, target)
        assert run.returncode == 1 and run.stderr.startswith(line) and run.stderr.count("\n") == 1
    run = run_main(export_record.main, tmp_path / "imported")
    assert run.returncode == 0 and "files as they were exported" in run.stdout
    (folder / "SHA256SUMS").unlink()  # the change was intended
    hf_to_neox(folder, tmp_path / "again", 1, 0)


def test_a_damaged_pytorch_model_bin(neox, tmp_path):
    neox_to_hf(neox, tmp_path / "hf")
    folder = tmp_path / "hf"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hf_to_neox(folder, tmp_path / "imported", 1, 0)
    flip_bit(folder / "pytorch_model.bin")
    with pytest.raises(ConvertError, match="pytorch_model.bin: damaged: model.embed_tokens.weight"):
        hf_to_neox(folder, tmp_path / "again", 1, 0)


# what --overwrite removes


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_only_exports_are_replaced(neox, tmp_path):
    neox_to_hf(neox, tmp_path / "hf")
    commands = {
        "hf": lambda target: neox_to_hf(neox, target, overwrite=True),
        "imported": lambda target: hf_to_neox(tmp_path / "hf", target, 2, 0, overwrite=True),
        "reshaped": lambda target: reshape_neox(neox, target, 2, 1, overwrite=True),
    }
    for name, command in commands.items():
        export = tmp_path / name
        command(export)
        before = everything(export)
        command(export)
        assert everything(export) == before
        for other, other_command in commands.items():
            if (name == "hf") != (other == "hf"):
                with pytest.raises(ConvertError, match="not overwritten"):
                    other_command(export)
        (export / "mine.txt").write_text("mine")
        with pytest.raises(ConvertError, match="not overwritten"):
            command(export)
        (export / "mine.txt").unlink()
        (export / "mine").symlink_to(neox)
        with pytest.raises(ConvertError, match="not overwritten"):
            command(export)
        (export / "mine").unlink()
        command(export)
        (export / "SHA256SUMS").unlink()
        with pytest.raises(ConvertError, match="nothing that this command wrote: not overwritten"):
            command(export)


def test_a_training_is_never_replaced(neox, tmp_path):
    """A folder of someone else is not replaced either, even if it has some files of an export."""
    before = everything(neox)
    write(tmp_path / "source", MODEL, 1, 0, next(neox.glob("*/configs")) / "none.json")
    with pytest.raises(ConvertError, match="nothing that this command wrote: not overwritten"):
        reshape_neox(neox, neox, 1, 0, overwrite=True)
    assert everything(neox) == before
    for content in ({"config.json": "{}"}, {"config.json": '{"model_type": "metala"}'}, {"a": ""}):
        theirs = tmp_path / "theirs"
        shutil.rmtree(theirs, ignore_errors=True)
        theirs.mkdir()
        for name, text in {**content, "README.md": "# Mine"}.items():
            (theirs / name).write_text(text)
        with pytest.raises(ConvertError, match="nothing that this command wrote: not overwritten"):
            neox_to_hf(neox, theirs, overwrite=True)
        assert set(everything(theirs)) == {*content, "README.md"}
    file = tmp_path / "a file"
    file.write_text("mine")
    with pytest.raises(ConvertError, match="a file exists, and is nothing"):
        neox_to_hf(neox, file, overwrite=True)
    assert file.read_text() == "mine"
