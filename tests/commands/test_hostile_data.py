"""prepare_data.py with unusual text, on a full disk, and at the same time as another run."""

from __future__ import annotations

import codecs
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_patch.commands import prepare_data
from megatron_patch.commands.documents import iterate_documents, list_files
from megatron_patch.indexed_dataset import IndexedDataset, IndexedDatasetError, IndexedDatasetWriter

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
END = "<|endoftext|>"


@pytest.fixture
def prepare(tmp_path, tokenizer_file, run_command):
    """Function: runs prepare_data.py to PREFIX `out`; returns its result and the documents."""

    def run(*arguments, tokenizer=tokenizer_file):
        prefix = tmp_path / "out"
        arguments = (*arguments, "--output", prefix, "--overwrite", "--tokenizer", tokenizer)
        result = run_command("prepare_data.py", *arguments)
        assert "Traceback" not in result.stderr
        if result.returncode:
            assert not list(tmp_path.glob("out*"))
            return result, None
        return result, [list(document) for document in IndexedDataset(prefix)]

    return run


def write_lines(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("is_special", [True, False])
def test_special_tokens_in_text_are_text(prepare, tmp_path, tokenizer_file, is_special):
    text = f"One page.{END}Another <|padding|> page.{END}"
    data = write_lines(tmp_path / "a.jsonl", text, "plain")
    description = json.loads(tokenizer_file.read_text())
    description["added_tokens"][0]["special"] = is_special
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    own = tmp_path / "tokenizer.json"
    result, documents = prepare(data, tokenizer=own)
    assert [document.count(0) for document in documents] == [1, 1]
    assert 1 not in documents[0]
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    decoded = tokenizer.decode(documents[0][:-1], skip_special_tokens=False)
    assert decoded == text
    assert (
        f"special tokens in the text: {END} 2, <|padding|> 1; read as text, "
        "--special-tokens reads them as such\n"
    ) in result.stdout

    result, documents = prepare(data, "--special-tokens", tokenizer=own)
    assert documents[0] == [*tokenizer.encode(text).ids, 0] and documents[0].count(0) == 3
    assert "; read as such\n" in result.stdout


def test_a_tokenizer_that_ends_documents_by_other_means_is_refused(prepare, tmp_path):
    vocabulary = {END: 0, "a": 1}
    tokenizer = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": END}}
    tokenizer = {"version": "1.0", "added_tokens": [], **tokenizer}
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (tmp_path / "words.json").write_text(json.dumps(tokenizer))
    data = write_lines(tmp_path / "a.jsonl", "a a b")
    result, _ = prepare(data, tokenizer=tmp_path / "words.json")
    assert result.returncode == 1
    assert f"words.json: makes {END}, which ends a document, of other text" in result.stderr


def test_truncation_and_padding_of_a_tokenizer_are_not_used(prepare, tmp_path, tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "cut.json"))
    data = write_lines(tmp_path / "a.jsonl", "some words that are more than four tokens")
    _, (document,) = prepare(data, tokenizer=tmp_path / "cut.json")
    _, (wanted,) = prepare(data)
    assert document == wanted and len(document) > 5


def test_a_byte_order_mark_is_no_text(prepare, tmp_path):
    line = b'{"text": "one"}\n'
    for name, content in (("a.txt", b"one"), ("a.jsonl", line), ("b.jsonl", line * 2)):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content)
        _, documents = prepare(tmp_path / name)
        (tmp_path / name).write_bytes(content)
        assert documents == prepare(tmp_path / name)[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a\\ud800b"}', r":2: found the lone surrogate '\ud800', wanted text"),
        (b'{"text": ' + b"[" * 200_000, ":2: wanted an object with a text under 'text'"),
        (b"[" * 200_000 + b"]" * 200_000, ":2: wanted an object with a text under 'text'"),
        (b'{"text": ' + b"1" * 5000 + b"}", ":2: wanted an object with a text under 'text'"),
        (b'{"text": "\xff"}', ":2: not UTF-8 text: "),
        (b'{"text": "' + b"a" * 2000 + b'"}', ":2: found a document of more than 1,000 bytes"),
        (b'{"text": "' + b"a" * 900 + b'"}', ":2: found 900 characters that this tokenizer has"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(prepare, tmp_path, line, message, tokenizer_file):
    description = json.loads(tokenizer_file.read_text())
    description["pre_tokenizer"]["use_regex"] = False  # then no cut is safe
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line)
    limits = ("--max-stretch", 800, "--max-document", 1000 if b"aaa" in line else 10**6)
    result, _ = prepare(tmp_path / "a.jsonl", *limits, tokenizer=tmp_path / "tokenizer.json")
    assert result.returncode == 1
    assert f"prepare_data.py: {tmp_path}/a.jsonl{message}" in result.stderr


def test_nothing_is_left_out_unsaid(prepare, tmp_path, monkeypatch):
    corpus = tmp_path / "corpus"
    (corpus / "sub").mkdir(parents=True)
    (corpus / "a.txt").write_text("text")
    (corpus / "broken.png").symlink_to("nowhere")  # has no wanted suffix
    (corpus / "linked").symlink_to(corpus / "sub")
    result, documents = prepare(corpus)
    assert len(documents) == 1
    assert f"left out: {corpus}/linked, a link to a folder; it can be an input" in result.stderr

    bad = corpus / "sub" / "b.txt"
    for make, what in (
        (lambda: bad.symlink_to("nowhere"), "a broken link"),
        (lambda: bad.symlink_to(bad), "a broken link"),
        (lambda: os.mkfifo(bad), "no regular file"),
    ):
        (tmp_path / "out.bin").unlink(missing_ok=True)
        (tmp_path / "out.idx").unlink(missing_ok=True)
        make()
        for source in (corpus, bad):
            if source == bad and what == "a broken link":
                continue  # refused earlier, as a missing input
            result, _ = prepare(source)
            assert result.returncode == 1
            assert f"{bad}: found {what}, wanted a file with text" in result.stderr
        bad.unlink()

    def scandir(path, scan=os.scandir):  # root, who may run the tests, can read every folder
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(PermissionError, match="sub"):
        list_files([corpus])


def test_the_tokenizer_is_a_regular_file(prepare, tmp_path):
    data = write_lines(tmp_path / "a.jsonl", "a")
    result, _ = prepare(data, tokenizer="/dev/zero")
    assert result.returncode == 2
    assert "--tokenizer: found the device or pipe /dev/zero, wanted a file" in result.stderr


def test_memory_does_not_follow_the_largest_document(prepare, tmp_path, tokenizer_file):
    """6 MB took over 1 GB when they were encoded at once."""
    code = (
        "import resource, sys; from megatron_patch.commands.prepare_data import main\n"
        "main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )

    def peak(size: int) -> int:
        data = write_lines(tmp_path / "a.jsonl", ("def words(x): " * (size // 14)))
        result = subprocess.run(
            [sys.executable, "-c", code, data, "--output", tmp_path / "out", "--overwrite"]
            + ["--tokenizer", tokenizer_file],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(result.stdout.splitlines()[-1])

    assert peak(6_000_000) - peak(300_000) < 30 * 6_000_000


def start(data: Path, tokenizer: Path, prefix: Path, *options: object, **how) -> subprocess.Popen:
    command = [sys.executable, SCRIPTS / "prepare_data.py", data, "--tokenizer", tokenizer]
    command += ["--output", prefix, *options]
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, **how)


@pytest.mark.parametrize("part", ["bin", "idx"])
def test_a_full_disk_leaves_what_was_there(tmp_path, tokenizer_file, part):
    """A limit on file sizes acts as a full disk: writing fails late, when buffers are flushed."""
    many = part == "idx"  # documents of one token each: more index than tokens
    data = write_lines(tmp_path / "a.jsonl", *(["a"] * 4000 if many else ["many words " * 3000]))
    prefix = tmp_path / "data" / "text"
    with IndexedDatasetWriter(prefix, 512) as writer:
        writer.add_document([7])
    before = {path: path.read_bytes() for path in prefix.parent.iterdir()}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(data, tokenizer_file, prefix, "--overwrite", preexec_fn=limit)
    _, error = process.communicate()
    assert process.returncode == 1 and "File too large" in error.splitlines()[-1], error
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in prefix.parent.iterdir()} == before


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGHUP], [signal.SIGTERM] * 2])
def test_ended_by_a_signal_it_leaves_nothing(tmp_path, tokenizer_file, signals):
    data = write_lines(tmp_path / "a.jsonl", *["many words " * 200] * 20_000)
    prefix = tmp_path / "data" / "text"
    process = start(data, tokenizer_file, prefix)
    wait_for(lambda: (size_of(prefix) or 0) > 100_000)
    for number in signals:
        process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signals[0], error
    assert not list(prefix.parent.iterdir())


def size_of(prefix: Path) -> int | None:
    path = Path(f"{prefix}.bin.tmp")
    return path.stat().st_size if path.exists() else None


def wait_for(is_so) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_runs_to_one_prefix_do_not_mix(tmp_path, tokenizer_file):
    data = write_lines(tmp_path / "a.jsonl", "one")
    with IndexedDatasetWriter(tmp_path / "out", 512) as writer:
        writer.add_document([7, 8])
        with pytest.raises(IndexedDatasetError, match=r"out.bin.tmp: another process is writing"):
            IndexedDatasetWriter(tmp_path / "out", 512)
        process = start(data, tokenizer_file, tmp_path / "out")
        _, error = process.communicate()
        assert process.returncode == 1
        assert "out.bin.tmp: another process is writing this data set" in error
        writer.add_document([9])
    assert [list(document) for document in IndexedDataset(tmp_path / "out")] == [[7, 8], [9]]


def test_what_a_killed_run_left_is_written_over(tmp_path):
    (tmp_path / "out.bin.tmp").write_bytes(b"left" * 100)
    (tmp_path / "out.idx.tmp").write_bytes(b"left" * 100)
    with IndexedDatasetWriter(tmp_path / "out", 512) as writer:
        writer.add_document([7, 8])
    assert [list(document) for document in IndexedDataset(tmp_path / "out")] == [[7, 8]]
    assert len(list(tmp_path.iterdir())) == 2


TEXTS = st.text(max_size=20) | st.sampled_from([END, "\ufeff", "\ud800", " ", "a b"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | TEXTS,
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.just("text") | TEXTS, x, max_size=2),
    max_leaves=5,
)
LINES = JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30)
NO_DEADLINE = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@NO_DEADLINE
@given(lines=st.lists(LINES, min_size=1, max_size=3), suffix=st.sampled_from([".txt", ".jsonl"]))
def test_any_file_is_prepared_or_refused_in_a_line(tmp_path, tokenizer_file, lines, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(b"\n".join(lines))
    try:
        documents = iterate_documents([path], max_bytes=200)
        encoder = prepare_data.Encoder(tokenizer_file)
        prepared = prepare_data.prepare(documents, encoder, tmp_path / "out", max_stretch=100)
    except ValueError as error:
        assert "\n" not in str(error)
        assert str(error).startswith((str(path), "inputs: found no text"))
    else:
        assert prepared.documents == len(IndexedDataset(tmp_path / "out")) > 0


@NO_DEADLINE
@given(data=st.data())
def test_any_pair_is_read_or_refused_in_a_line(tmp_path, data):
    prefix = tmp_path / "pair"
    with IndexedDatasetWriter(prefix, 512) as writer:
        for document in ([1, 2, 3], [], list(range(50))):
            writer.add_document(document)
    for name in data.draw(st.sampled_from([["idx"], ["bin"], ["idx", "bin"]])):
        path = Path(f"{prefix}.{name}")
        raw = bytearray(path.read_bytes())
        for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=4)):
            raw[place] = data.draw(st.sampled_from([0, 1, 127, 255]))
        raw = raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]
        path.write_bytes(raw if data.draw(st.booleans()) else data.draw(st.binary(max_size=60)))
    try:
        dataset = IndexedDataset(prefix)
    except IndexedDatasetError as error:
        assert "\n" not in str(error) and str(error).startswith(str(prefix))
    else:
        assert [len(document) for document in dataset] == list(dataset.sizes)


def test_offsets_beyond_64_bits_are_refused(tmp_path):
    """An offset plus a size would overflow to a negative number, and give an empty document."""
    with IndexedDatasetWriter(tmp_path / "pair", 512) as writer:
        writer.add_document([1, 2, 3])
    raw = bytearray((tmp_path / "pair.idx").read_bytes())
    raw[38:46] = (2**63 - 2).to_bytes(8, "little")
    (tmp_path / "pair.idx").write_bytes(raw)
    with pytest.raises(IndexedDatasetError, match="pair.bin: truncated: found 6 bytes, wanted 92"):
        IndexedDataset(tmp_path / "pair")
