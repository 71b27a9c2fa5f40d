"""Hostile folders: their code does not run, nothing outside of them is read or copied, and devices
and FIFOs are not opened."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from convert import hf_to_neox as hf_to_neox_command
from convert import neox_to_hf as neox_to_hf_command
from convert.command import ConvertError
from convert.hf_io import size_argument
from convert.hf_to_neox import hf_to_neox
from convert.neox_to_hf import neox_to_hf
from convert.reshape_neox import reshape_neox
from convert.tokenizer import read_tokenizer
from megatron_patch.architecture import SettingsError
from megatron_patch.architecture_neox import expand_attention_config
from megatron_patch.hf import MetaLAConfig
from megatron_patch.neox.yaml_config import merge_yaml_texts
from tests.convert.synthetic import Model, write

ROOT = Path(__file__).resolve().parents[2]
MODEL = Model(layers=1)
SECRET = "the-private-key"


@pytest.fixture
def neox(tmp_path, vocab_file) -> Path:
    write(tmp_path / "neox", MODEL, 1, 1, vocab_file)
    return tmp_path / "neox"


@pytest.fixture
def hf(neox, tmp_path) -> Path:
    neox_to_hf(neox, tmp_path / "hf")
    (tmp_path / "hf/SHA256SUMS").unlink(missing_ok=True)
    return tmp_path / "hf"


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "secret.txt"
    path.write_text(SECRET)
    return path


def set_settings(neox: Path, **changes) -> None:
    file = neox / "global_step7/configs/all.yml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))


def one_line(run: subprocess.CompletedProcess) -> str:
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("command: ")
    return run.stderr


# code


@pytest.fixture
def with_code(hf, tmp_path) -> Path:
    """A tokenizer's folder whose code writes the file `witness`."""
    folder = tmp_path / "with_code"
    folder.mkdir()
    code = f"open({str(tmp_path / 'witness')!r}, 'w').close()\n"
    (folder / "tokenization.py").write_text(
        f"{code}from transformers import PreTrainedTokenizerFast\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )
    shutil.copy(hf / "tokenizer.json", folder)
    auto_map = {"AutoTokenizer": ["tokenization.Tokenizer", "tokenization.Tokenizer"]}
    config = {"tokenizer_class": "Tokenizer", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_tokenizer_does_not_run(with_code, neox, hf, run_main, tmp_path, monkeypatch):
    """It does not run even if stdin answers yes to the question of transformers."""
    yes = "y\n" * 9
    set_settings(neox, vocab_file=str(with_code))
    shutil.copy(with_code / "tokenization.py", hf)
    shutil.copy(with_code / "tokenizer_config.json", hf)
    convert = ("--output", tmp_path / "out")
    layout = ("--tensor-parallel", 1, "--pipeline-parallel", 0)
    monkeypatch.setattr(sys, "stdin", io.StringIO(yes))
    line = one_line(run_main(neox_to_hf_command.main, "--checkpoint", neox, *convert))
    assert "tokenizer_config.json: auto_map: the tokenizer needs code of its own" in line
    (with_code / "tokenizer.json").unlink()
    to_neox = ("--model", hf, *convert, *layout)
    one_line(run_main(hf_to_neox_command.main, *to_neox, "--tokenizer", with_code))
    assert not (tmp_path / "out").exists()
    chat = subprocess.run(
        [sys.executable, "scripts/chat.py", hf, "--max-new-tokens", "1"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input=yes,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in chat.stderr
    assert not (tmp_path / "witness").exists()


# links and files without an end


def test_links_in_a_tokenizers_folder(hf, neox, secret, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf / name, folder)
    set_settings(neox, vocab_file=str(folder))
    (folder / "chat_template.jinja").symlink_to("tokenizer_config.json")  # inside
    neox_to_hf(neox, tmp_path / "out", overwrite=True)
    (folder / "chat_template.jinja").unlink()
    for name in ("vocab.txt", "merges.txt", "tokenizer_config.json", "another.model"):
        kept = (folder / name).read_bytes() if (folder / name).is_file() else None
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        with pytest.raises(ConvertError, match=f"{name}: cannot be read: refused: it leads out of"):
            neox_to_hf(neox, tmp_path / "new")
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ConvertError, match=f"{name}: cannot be read: no regular file"):
            neox_to_hf(neox, tmp_path / "new")
        (folder / name).unlink()
        if kept:
            (folder / name).write_bytes(kept)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "vocab_file": str(secret)}))
    with pytest.raises(ConvertError, match="secret.txt: cannot be read: refused: it leads out of"):
        neox_to_hf(neox, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["/dev/zero", "a fifo", "a loop", "x" * 256, "a\0b", "~nobody/x"])
def test_a_vocab_file_that_is_no_file(name, neox, run_main, tmp_path):
    os.mkfifo(tmp_path / "a fifo")
    (tmp_path / "a loop").symlink_to(tmp_path / "a loop")
    set_settings(neox, vocab_file=name if name[0] in "/~" else str(tmp_path / name))
    flags = ("--checkpoint", neox, "--output", tmp_path / "o")
    line = one_line(run_main(neox_to_hf_command.main, *flags))
    assert "no regular file" in line or "is not there; give the tokenizer by --tokenizer" in line


@pytest.mark.parametrize("kind", ["file", "folder", "step"])
def test_linked_settings_are_not_copied(kind, neox, secret, tmp_path):
    step = neox / "global_step7"
    if kind == "file":
        secret.write_text(f"password: {SECRET}")
        (step / "configs/more.yml").symlink_to(secret)
    elif kind == "folder":
        shutil.move(step / "configs", tmp_path / "configs")
        (step / "configs").symlink_to(tmp_path / "configs")
    else:
        shutil.move(step, tmp_path / "step")
        step.symlink_to(tmp_path / "step")
    for convert in (
        lambda: reshape_neox(neox, tmp_path / "out", 1, 0),
        lambda: neox_to_hf(neox, tmp_path / "out"),
    ):
        with pytest.raises(ConvertError, match=r"\.yml: cannot be read: refused: it leads out of"):
            convert()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["latest", "layer_02-model_00-model_states.pt", "mp_rank_00"])
def test_linked_files_of_a_checkpoint(name, neox, tmp_path):
    (file,) = [path for path in neox.rglob("*") if path.name.startswith(name)]
    shutil.move(file, tmp_path / file.name)
    file.symlink_to(tmp_path / file.name)
    with pytest.raises(ConvertError, match=f"{name}.*refused: it leads out of"):
        neox_to_hf(neox, tmp_path / "hf")
    file.unlink()
    shutil.move(tmp_path / file.name, neox / "kept")
    file.symlink_to(neox / "kept")  # inside
    neox_to_hf(neox, tmp_path / "hf")


def test_weights_that_an_index_names_elsewhere(hf, tmp_path):
    weights = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    save_file(weights, tmp_path / "outside.safetensors")
    (hf / "inside.safetensors").symlink_to(tmp_path / "outside.safetensors")
    os.mkfifo(hf / "fifo.safetensors")
    for name in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "inside.safetensors",
        "fifo.safetensors",
        "/dev/zero",
        "..",
        "x" * 256,
        "a\0b",
    ):
        index = {"weight_map": dict.fromkeys(weights, name)}
        (hf / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ConvertError, match="cannot be read: "):
            hf_to_neox(hf, tmp_path / "out", 1, 0)


def test_a_snapshot_in_the_cache_of_hugging_face(hf, tmp_path):
    """The files of a snapshot are links into the cache's folder of blobs."""
    cache = tmp_path / "cache/models--somebody--metala"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/abc").mkdir(parents=True)
    for i, file in enumerate(sorted(hf.iterdir())):
        shutil.copy(file, cache / f"blobs/{i}")
        (cache / "snapshots/abc" / file.name).symlink_to(f"../../blobs/{i}")
    written = hf_to_neox(cache / "snapshots/abc", tmp_path / "imported", 1, 0)
    assert written.shape.num_layers == 1
    blob = (cache / "snapshots/abc/tokenizer.json").resolve()
    shutil.move(blob, tmp_path / "elsewhere.json")
    blob.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ConvertError, match="tokenizer.json: cannot be read: refused: it leads out"):
        hf_to_neox(cache / "snapshots/abc", tmp_path / "again", 1, 0)


@pytest.mark.parametrize("name", ["a\nb.yml", "a\x1b[2J.yml", "\udcff.yml"])
def test_names_that_would_break_lines(name, neox, tmp_path):
    (neox / "global_step7/configs" / name).write_text("seed: 1")
    with pytest.raises(ConvertError, match="found a name that no terminal shows") as error:
        neox_to_hf(neox, tmp_path / "hf")
    assert str(error.value).isprintable()


# sizes


def test_sizes_are_compared_with_the_tensors_first(neox, hf, tmp_path):
    for settings in (
        {"num_layers": 10**18, "attention_config": [[["metala"], 10**18]]},
        {"num_layers": 10**18, "attention_config": None},
        {"num_layers": 9999, "attention_config": [[["metala"], 9999]]},
        {"attention_config": [[["metala"], 10**11]]},
        {"attention_config": [[["metala"], "all"], [["metala"], 10**18]]},
        {"model_parallel_size": 10**18},
        {"hidden_size": 2**62, "num_attention_heads": 1},
    ):
        set_settings(neox, **settings)
        with pytest.raises((ConvertError, SettingsError)):
            neox_to_hf(neox, tmp_path / "out")
    with pytest.raises(SettingsError, match="num_layers: found 10{18}, wanted a whole number from"):
        expand_attention_config(None, 10**18)
    with pytest.raises(ValueError, match="decoder_layers: found 10{18}, wanted a whole number fro"):
        MetaLAConfig(decoder_layers=10**18)
    config = json.loads((hf / "config.json").read_text())
    for layers in (10**18, 9999):
        (hf / "config.json").write_text(json.dumps({**config, "decoder_layers": layers}))
        with pytest.raises(ConvertError, match="decoder_layers"):
            hf_to_neox(hf, tmp_path / "out", 1, 0)


def test_tensors_that_claim_more_than_the_file_holds(neox, tmp_path):
    file = neox / "global_step7/layer_02-model_00-model_states.pt"
    tensors = torch.load(file)
    huge = torch.zeros(1).as_strided((2**40, 2**20), (0, 0))
    for odd, message in (
        (huge, "of which the file holds 4 bytes alone"),
        (torch.zeros(96, 32).to_sparse(), "is a tensor without data of its own"),
        (torch.empty(96, 32, device="meta"), "is a tensor without data of its own"),
        (torch.zeros(96, 32, dtype=torch.int64), "is torch.int64, wanted float64, float32"),
        (torch.zeros(96, 32, dtype=torch.complex64), "is torch.complex64, wanted float64"),
        ([1.0], "is a list, no tensor"),
    ):
        torch.save({**tensors, "mixer.in_proj.weight": odd}, file)
        with pytest.raises(ConvertError, match=f"layer_02.*mixer.in_proj.weight.*{message}"):
            neox_to_hf(neox, tmp_path / "hf")


# text


@pytest.mark.parametrize(
    "text",
    [
        "a\0b: 1",
        "a: " + "9" * 5000,
        "a: 0x" + "f" * 5000,
        "a: 2001-99-99",
        "a: !!int x",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: !!int ''",
        "a: " + "[" * 5000,
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(40)),
        "x" * 2**21,
    ],
)
def test_settings_that_are_no_settings(text):
    with pytest.raises(SettingsError) as error:
        merge_yaml_texts({"a.yml": text})
    assert str(error.value).startswith("a.yml: ") and len(str(error.value)) < 5000
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff", b"a\0b: 1", b"", b"{", b"global_step9", b"..", b"."])
@pytest.mark.parametrize("name", ["latest", "global_step7/configs/all.yml"])
def test_texts_of_a_checkpoint(name, content, neox, tmp_path):
    (neox / name).write_bytes(content)
    with pytest.raises((ConvertError, SettingsError)) as error:
        neox_to_hf(neox, tmp_path / "hf")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"expansion_factor": 1e308, "intermediate_size": None},
        {"expansion_factor": float("inf"), "intermediate_size": None},
        {"metala": {"expand_k": 1e308}},
        {"metala": {"tau": float("nan")}},
        {"metala": {"tau": 10**30}},
        {"metala": {"side": "hf"}},
        {"hidden_size": float("nan")},
        {"rms_norm_epsilon": float("nan")},
        {"norm": ["rmsnorm"]},
        {"norm": float("nan")},
        {"tokenizer_type": "a\nb"},
        {"pos_emb": {"a": 1}},
        {"make_vocab_size_divisible_by": 10**40},
        {"make_vocab_size_divisible_by": 2**62},
        {"num_layers": "one"},
        {"attention_config": [[["metala"], float("nan")]]},
        {"attention_config": [[["metala"], True]]},
        {"attention_config": {"metala": 1}},
        {"vocab_file": "\n"},
    ],
)
def test_odd_values_in_settings(changes, neox, tmp_path):
    set_settings(neox, **changes)
    with pytest.raises((ConvertError, SettingsError)) as error:
        neox_to_hf(neox, tmp_path / "hf")
    assert "\n" not in str(error.value)


def test_arguments_that_make_no_sense(neox, run_main, tmp_path):
    def line(*flags: object, checkpoint: object = neox) -> str:
        command = neox_to_hf_command.main
        return one_line(run_main(command, "--checkpoint", checkpoint, "--output", *flags))

    assert "--push-to-hub" in line(tmp_path / "out", "--push-to-hub", "")
    for target in ("x" * 256, "x" * 250):
        assert "cannot be written" in line(tmp_path / target)
    (tmp_path / "loop").symlink_to("loop")
    assert "loop" in line(tmp_path / "loop")
    assert "File name too long" in line(tmp_path / "out", checkpoint="x" * 256)
    for size in ("0", "0.1B", "9" * 400 + "GB", "1e400", "NaN", "٣GB"):
        with pytest.raises(ArgumentTypeError, match="wanted a size such as 5GB"):
            size_argument(size)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_json_of_any_size_is_not_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConvertError, match="tokenizer.json: cannot be read: more than 134 MB"):
        read_tokenizer(path)
