"""chat.py with unusual input and logits: it prints a line and goes on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from chat import ChatError, Conversation, chooser

from tests.scripts.talking import (
    FORGETFUL_TEMPLATE,
    SCRIPT,
    TEMPLATE,
    build_tokenizer,
    talk,
)

END = "<|endoftext|>"


def test_a_failed_turn_changes_nothing(model, tokenizer_file, monkeypatch):
    for template in (None, TEMPLATE, FORGETFUL_TEMPLATE):
        conversation = Conversation(model, build_tokenizer(tokenizer_file, template))
        talk(conversation, "one")
        other = Conversation(model, conversation.tokenizer)
        talk(other, "one")
        for failing in (
            lambda *_, **__: 1 / 0,
            lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no\nmemory")),
        ):
            calls, forward = [], model.forward

            def fail_later(*args, calls=calls, forward=forward, failing=failing, **kwargs):
                calls.append(1)
                return failing() if len(calls) == 3 else forward(*args, **kwargs)

            monkeypatch.setattr(model, "forward", fail_later)
            with pytest.raises((ChatError, ZeroDivisionError)) as error:
                talk(conversation, "two")
            assert "\n" not in str(error.value)
            monkeypatch.setattr(model, "forward", forward)
        with monkeypatch.context() as patch:
            patch.setattr(conversation, "_read", lambda _: torch.full((512,), torch.nan))
            for temperature in (0, 0.8):
                with pytest.raises(ChatError, match="gives NaN or infinity for the next token"):
                    conversation.say("two", chooser(temperature, 0.9), 5, lambda _: None)
        assert (conversation.messages, conversation.text) == (other.messages, other.text)
        assert talk(conversation, "two")[0][1] == talk(other, "two")[0][1]


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-30, 1e308])
@pytest.mark.parametrize("top_p", [5e-324, 0.5, 1.0])
def test_every_temperature_gives_a_token(temperature, top_p):
    logits = torch.tensor([0.0, 3.0, 2.0, -9.0])
    token = chooser(temperature, top_p)(logits)
    assert token in range(4) and (temperature > 1 or token == 1)


def test_a_template_that_breaks_says_so(model, tokenizer_file):
    for template in ("{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{{ none.x.y }}", "{{"):
        conversation = Conversation(model, build_tokenizer(tokenizer_file, template))
        with pytest.raises(ChatError, match="^the chat template: .+"):
            talk(conversation, "hello")
        assert conversation.messages == [] and conversation.cache.get_seq_length() == 0


def test_bytes_that_are_no_text_end_nothing(folder, tmp_path):
    """A terminal that cannot show the model's words does not end the chat either."""
    typed = b"hello\n\xff\xfe words\nmore\n"
    result = subprocess.run(
        [sys.executable, SCRIPT, folder(TEMPLATE), "--max-new-tokens=20", "--seed=0", "--stats"],
        input=typed,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": ":"}
        | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr.decode()
    out = result.stdout.decode(errors="replace")
    assert out.count("tokens read") == 2, out
    assert "(found bytes that are not " in out


def test_a_closed_standard_input_is_an_empty_one(folder):
    command = f'"{sys.executable}" "{SCRIPT}" "{folder()}" <&-'
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"}
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
