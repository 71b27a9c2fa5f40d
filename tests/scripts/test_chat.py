"""chat.py: what the user types, what the model reads, what it answers."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import chat
import pytest
import torch
from chat import ChatError, Conversation, chooser

from tests.scripts.talking import (
    FORGETFUL_TEMPLATE,
    NO_SYSTEM_TEMPLATE,
    SCRIPT,
    TEMPLATE,
    build_tokenizer,
    greedy,
    talk,
)


@pytest.fixture
def fed(model, monkeypatch):
    """A list that records the length of each input to the model."""
    lengths = []
    forward = model.forward

    def counted(input_ids, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    return lengths


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_turn_reads_only_what_is_new(model, tokenizer_file, fed, template):
    tokenizer = build_tokenizer(tokenizer_file, template)
    conversation = Conversation(model, tokenizer, system="Be brief.")
    turns = talk(conversation, "def read(self):", "and now?", "go on")
    read = [turn.tokens_read for turn, _ in turns]
    assert fed == [n for count in read for n in (count, 1, 1, 1, 1, 1)]

    # Each answer equals that of one pass over everything before it.
    size = conversation.cache.nbytes
    whole: list[int] = []
    if template is None:
        news = ["Be brief.\ndef read(self):", "\nand now?", "\ngo on"]
    else:
        said = "<|system|>Be brief.<|endoftext|><|user|>def read(self):<|endoftext|><|assistant|>"
        more = [
            f"<|endoftext|><|user|>{w}<|endoftext|><|assistant|>" for w in ("and now?", "go on")
        ]
        news = [said, *more]
    for new, (turn, answer) in zip(news, turns, strict=True):
        ids = tokenizer(new)["input_ids"]
        assert turn.tokens_read == len(ids) and turn.tokens_written == len(answer) == 5
        whole += ids
        for token in answer:
            assert greedy(model(torch.tensor([whole])).logits[0, -1]) == token
            whole.append(token)
    assert conversation.cache.get_seq_length() == len(whole)
    assert conversation.cache.nbytes == size


def test_a_long_text_is_read_in_pieces(model, tokenizer_file, fed, monkeypatch):
    whole = chat.Conversation(model, build_tokenizer(tokenizer_file))
    ((turn, answer),) = talk(whole, "to read " * 40, tokens=2)
    fed.clear()
    monkeypatch.setattr(chat, "TOKENS_AT_ONCE", 16)
    ((_, again),) = talk(chat.Conversation(model, whole.tokenizer), "to read " * 40, tokens=2)
    assert again == answer and max(fed) == 16 and sum(fed) == turn.tokens_read + 2


def test_an_end_token_ends_and_is_not_read(model, tokenizer_file):
    conversation = Conversation(model, build_tokenizer(tokenizer_file, TEMPLATE))
    script = iter([7, 8, 0, 9, 0])
    shown = []
    turn = conversation.say("one", lambda logits: next(script), 10, shown.append)
    assert shown == [7, 8] and turn.tokens_written == 2
    assert conversation.cache.get_seq_length() == turn.tokens_read + 2
    stops = iter([False, True])
    turn = conversation.say("two", lambda _: next(script), 10, shown.append, lambda: next(stops))
    assert shown == [7, 8, 9] and turn.tokens_written == 1
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2


def test_a_template_that_rewrites_the_past_reads_all_again(model, tokenizer_file, capsys):
    tokenizer = build_tokenizer(tokenizer_file, FORGETFUL_TEMPLATE)
    conversation = Conversation(model, tokenizer)
    *_, (turn, _) = talk(conversation, "words that are soon forgotten", "more", tokens=12)
    assert "reading all again" in capsys.readouterr().err
    prompt = tokenizer.apply_chat_template(
        conversation.messages[:-1], tokenize=False, add_generation_prompt=True
    )
    count = len(tokenizer(prompt)["input_ids"])
    assert turn.tokens_read == count
    assert conversation.cache.get_seq_length() == count + 12


def test_a_template_that_refuses_says_so(model, tokenizer_file):
    tokenizer = build_tokenizer(tokenizer_file, NO_SYSTEM_TEMPLATE)
    conversation = Conversation(model, tokenizer, system="Be brief.")
    with pytest.raises(ChatError, match="the chat template: no system role"):
        talk(conversation, "hello")
    assert [m["role"] for m in conversation.messages] == ["system"]


def test_words_without_tokens_are_no_turn(model, tokenizer_file):
    conversation = Conversation(model, build_tokenizer(tokenizer_file))
    with pytest.raises(ChatError, match="no tokens"):
        talk(conversation, "<|endoftext|>")  # left out at the start of a text
    ((_, answer),) = talk(conversation, "one")
    fresh = Conversation(model, conversation.tokenizer)
    assert talk(fresh, "one")[0][1] == answer and fresh.text == conversation.text


def test_choosing():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 3.0, 2.0, -9.0])
    assert chooser(0, 0.5)(logits) == 1
    assert {chooser(1.0, 0.1)(logits) for _ in range(50)} == {1}
    assert {chooser(1.0, 0.9)(logits) for _ in range(200)} == {1, 2}
    drawn = [chooser(1.0, 1.0)(logits) for _ in range(2000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 2000
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.04, rtol=0)


@pytest.fixture
def run(run_command, monkeypatch):
    """Function: runs chat.py in this process with what is typed."""

    def run(folder, typed, *options):
        monkeypatch.chdir(folder.parent)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        options = ("--device=cpu", "--temperature=0", "--max-new-tokens=6", *options)
        return run_command("chat.py", folder, *options)

    return run


def test_driven_from_standard_input(folder, run):
    typed = "hello\nmore\n/reset\nhello\n\n/nonsense\n/quit\nnot read\n"
    result = run(folder(TEMPLATE), typed, "--stats")
    assert result.returncode == 0, result.stderr
    out = result.stdout
    read = [int(n) for n in re.findall(r"\((\d+) tokens read, \d+ written", out)]
    assert len(read) == 3 and read[0] == read[2]
    first, _, again, _ = re.split(r"\(\d+ tokens read.*\n", out)
    assert first.strip() and again == f"(all forgotten)\n{first}"
    assert "(/nonsense: no such command; there are /reset and /quit)" in out


def test_plain_text_and_the_end_of_input(folder, run):
    result = run(folder(), "def read(self):\n/usr/bin is a path, not a command\n", "--stats")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("tokens read") == 2 and "no such command" not in result.stdout


def test_ctrl_c_ends_the_answer_alone(folder):
    """At a terminal, Ctrl-C cuts the answer and the conversation goes on."""
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, folder(), "--max-new-tokens=1000000", "--seed=0", "--stats"],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TERM": "dumb"},
    )
    seen = ""

    def read_until(is_enough):
        nonlocal seen
        deadline = time.time() + 120
        while not is_enough():
            assert select.select([main], [], [], max(0.0, deadline - time.time()))[0], seen
            seen += os.read(main, 65536).decode(errors="replace")

    def wait_for(text):
        nonlocal seen
        read_until(lambda: text in seen)
        seen = seen.split(text, 1)[1]

    try:
        wait_for("> ")
        os.write(main, b"hello\n")
        wait_for("hello")
        read_until(lambda: seen.strip())  # the answer has begun
        process.send_signal(signal.SIGINT)
        wait_for("tokens read")
        wait_for("> ")
        os.write(main, b"/quit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(main)
        os.close(terminal)
