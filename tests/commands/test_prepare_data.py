"""prepare_data.py and train_tokenizer.py, from text to token files."""

from __future__ import annotations

import gzip
import json

import pytest
from tokenizers import Tokenizer

from megatron_patch.commands import prepare_data
from megatron_patch.indexed_dataset import IndexedDataset

TEXTS = ["def a(x):\n    return x\n" * 20, "Grüße, 世界! \x00\x7f\n", "three"]


@pytest.fixture
def folder(tmp_path):
    """b.txt, sub/a.jsonl with two documents and an empty one, and a file that is not text."""
    (tmp_path / "text" / "sub").mkdir(parents=True)
    (tmp_path / "text" / "b.txt").write_text(TEXTS[0], encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in (TEXTS[1], " \n", TEXTS[2])]
    (tmp_path / "text" / "sub" / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "text" / "picture.bin").write_bytes(b"\xff\xfe")
    return tmp_path / "text"


@pytest.fixture
def tokenizer_path(folder, tmp_path, run_command):
    path = tmp_path / "made" / "tokenizer.json"
    result = run_command("train_tokenizer.py", folder, "--output", path, "--vocab-size", 280)
    assert result.returncode == 0, result.stderr
    return path


def test_tokenizer_has_what_gpt_neox_looks_up(tokenizer_path):
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.token_to_id("<|padding|>") == 1
    assert 258 < tokenizer.get_vocab_size() <= 280
    for text in (*TEXTS, "never seen: Ωß\U0001f600"):
        tokens = tokenizer.encode(text).ids
        assert tokenizer.decode(tokens, skip_special_tokens=False) == text


def test_tokenizer_is_reproducible_and_not_replaced_unasked(
    folder, tokenizer_path, tmp_path, run_command
):
    arguments = (folder, "--output", tokenizer_path, "--vocab-size", 280)
    before = tokenizer_path.read_bytes()
    refused = run_command("train_tokenizer.py", *arguments)
    assert refused.returncode == 1
    assert f"{tokenizer_path} is already there; --overwrite replaces it" in refused.stderr
    assert run_command("train_tokenizer.py", *arguments, "--overwrite").returncode == 0
    assert tokenizer_path.read_bytes() == before


def test_too_small_a_vocabulary_is_refused(folder, tmp_path, run_command):
    result = run_command(
        "train_tokenizer.py", folder, "--output", tmp_path / "t.json", "--vocab-size", 100
    )
    assert result.returncode == 2
    assert "--vocab-size: found 100, wanted a whole number from 258" in result.stderr


@pytest.mark.parametrize("most", [1, 1000])
def test_documents_in_order_each_ended(
    folder, tokenizer_path, tmp_path, run_command, monkeypatch, most
):
    monkeypatch.setattr(prepare_data, "MOST_CHARACTERS", most)
    prefix = tmp_path / "data" / "text_document"
    result = run_command(
        "prepare_data.py",
        *(folder, "--output", prefix, "--tokenizer", tokenizer_path),
    )
    assert result.returncode == 0, result.stderr
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    documents = [list(document) for document in IndexedDataset(prefix)]
    assert [document[-1] for document in documents] == [0, 0, 0]
    assert [tokenizer.decode(document[:-1]) for document in documents] == TEXTS
    assert f"3 documents, {sum(map(len, documents)):,} tokens" in result.stdout


def test_existing_data_is_not_replaced_unasked(folder, tokenizer_path, tmp_path, run_command):
    prefix = tmp_path / "data"
    arguments = (folder / "b.txt", "--output", prefix, "--tokenizer", tokenizer_path)
    assert run_command("prepare_data.py", *arguments).returncode == 0
    refused = run_command("prepare_data.py", *arguments)
    assert refused.returncode == 1
    assert "data.bin is already there; --overwrite replaces it" in refused.stderr
    assert run_command("prepare_data.py", *arguments, "--overwrite").returncode == 0


def test_index_maps_go_with_the_data_they_index(folder, tokenizer_path, tmp_path, run_command):
    """Only maps of this prefix are removed, under GPT-NeoX's names and the plugin's."""
    prefix = tmp_path / "data/text"
    arguments = (folder / "b.txt", "--output", prefix, "--tokenizer", tokenizer_path)
    assert run_command("prepare_data.py", *arguments).returncode == 0
    end = "indexmap_4ns_64sl_1234s_packedpi_ac"
    of_others = ("text_test_train_{}_doc_idx", "text2_train_{}_doc_idx", "text_train_{}")
    for name in ("text_train_{}_doc_idx", "text_valid_0_{}_sample_idx", *of_others):
        (prefix.parent / f"{name.format(end)}.npy").touch()
    (prefix.parent / f"text_0123456789abcdef_test_{end}_shuffle_idx.npy").touch()
    assert run_command("prepare_data.py", *arguments, "--overwrite").returncode == 0
    left = {path.name for path in prefix.parent.glob("*.npy")}
    assert left == {f"{name.format(end)}.npy" for name in of_others}


@pytest.mark.parametrize("line", ['{"txt": "a"}', '{"text": 3}', "[1]", "{"])
def test_a_bad_line_is_named_and_nothing_written(tokenizer_path, tmp_path, run_command, line):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(line)
    arguments = ("--output", tmp_path / "x", "--tokenizer", tokenizer_path)
    result = run_command("prepare_data.py", bad, *arguments)
    assert result.returncode == 1
    assert f"{bad}:1: wanted an object with a text under 'text'" in result.stderr
    assert not list(tmp_path.glob("x.*"))


def test_json_lines_under_other_names(tokenizer_path, tmp_path, run_command):
    """Under a name in capitals or .ndjson they are read; elsewhere, where they would be one
    document with JSON in it, they are refused."""

    def prepare(name: str, text: str):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        outputs = ("--output", tmp_path / "x", "--overwrite", "--tokenizer", tokenizer_path)
        result = run_command("prepare_data.py", path, *outputs)
        if not result.returncode:  # the same from its folder
            again = run_command("prepare_data.py", path.parent, *outputs, "--suffix", path.suffix)
            assert again.stdout == result.stdout
        path.unlink()
        return result

    lines = '{"text": "a"}\n\n{"text": "b", "n": 1}\n'
    for name in ("a.jsonl", "a.JSONL", "a.ndjson", "a.NdJson"):
        assert ": 2 documents" in prepare(name, lines).stdout, name
    records = ("\n" + lines, '[{"text": "a"},\n {"text": "b"}]', f"\ufeff{lines}")
    for name, text in zip(("a.json", "a.JSON", "a.txt"), records, strict=True):
        result = prepare(name, text)
        assert result.returncode == 1
        found = f"{name}: found JSON objects with a text under 'text', wanted one a line in a file"
        assert found in result.stderr
    other = ('{"name": "a"}\n{"name": "b"}', '{"text": "a"}', "[1, 2]", "[{", "{}{", "{\n}\n", "[]")
    for text in other:
        assert ": 1 documents" in prepare("a.json", text).stdout, text


def test_other_bad_inputs(folder, tokenizer_path, tmp_path, run_command):
    def message(*arguments):
        result = run_command("prepare_data.py", *arguments, "--output", tmp_path / "x")
        assert result.returncode == 1
        return result.stderr

    tokenizer = ("--tokenizer", tokenizer_path)
    assert "no files ending in .c found" in message(folder, "--suffix", ".c", *tokenizer)
    assert "picture.bin: not UTF-8 text" in message(folder / "picture.bin", *tokenizer)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xff"}')
    assert "latin.jsonl:1: not UTF-8 text" in message(tmp_path / "latin.jsonl", *tokenizer)
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}'))
    found = message(packed / "a.jsonl.gz", *tokenizer)
    assert "a.jsonl.gz: found a file compressed by gzip, wanted text: unpack it" in found
    found = message(packed, *tokenizer)
    assert f"left out: {packed}/a.jsonl.gz, which is compressed\n" in found and "no files" in found
    lines = packed / "a.jsonl"  # the same under a name that says nothing
    lines.write_bytes(gzip.compress(b'{"text": "x"}'))
    assert "a.jsonl: found a file compressed by gzip" in message(lines, *tokenizer)
    lines.unlink()
    other = tmp_path / "other.json"
    other.write_text(tokenizer_path.read_text().replace("<|endoftext|>", "</s>"))
    assert "has no <|endoftext|> token" in message(folder, "--tokenizer", other)


def test_the_home_folder_is_known_behind_an_equals_sign(
    folder, tokenizer_path, tmp_path, run_command, monkeypatch
):
    """`--output=~/x` comes with its `~`: a shell replaces it at the start of a word alone."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    arguments = (folder / "b.txt", f"--tokenizer={tokenizer_path}", "--output=~/data/x")
    result = run_command("prepare_data.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "home/data/x.bin").exists()


def test_a_text_may_begin_as_compressed_files_do(tokenizer_path, tmp_path, run_command):
    (tmp_path / "a.txt").write_text("BZh, PK\x03\x04")
    arguments = ("--tokenizer", tokenizer_path, "--output", tmp_path / "x")
    result = run_command("prepare_data.py", tmp_path / "a.txt", *arguments)
    assert result.returncode == 0, result.stderr
