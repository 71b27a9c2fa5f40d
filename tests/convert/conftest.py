"""A tokenizer for the synthetic models, and the commands run in the test's own process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.commands.command_line import run_script
from tests.convert.synthetic import TOKENS


def write_tokenizer(path: Path, special: tuple[str, ...], tokens: int = TOKENS) -> Path:
    """A word-level tokenizer.json with exactly `tokens` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{i}" for i in range(tokens - len(special))]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(path))
    return path


@pytest.fixture
def run_main(capsys, monkeypatch) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `main(flags)` of a command as a terminal does, under the name `command`, and returns
    what a process of its own would have."""
    monkeypatch.setattr(sys, "argv", ["command"])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(main: Callable[[list[str]], None], *flags: object) -> subprocess.CompletedProcess:
        capsys.readouterr()
        code = 0
        try:
            run_script(lambda: main([str(flag) for flag in flags]))
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # Python prints it, and exits with code 1
                print(code, file=sys.stderr)
                code = 1
        return subprocess.CompletedProcess(flags, code or 0, *capsys.readouterr())

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory) -> Path:
    """A tokenizer.json with end-of-document and padding tokens."""
    folder = tmp_path_factory.mktemp("vocabulary")
    return write_tokenizer(folder / "tokenizer.json", ("<|endoftext|>", "<|padding|>"))
