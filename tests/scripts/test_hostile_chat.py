"""chat.py with unusual input, saved files and logits: it prints a line and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from chat import ChatError, Conversation, chooser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.scripts.talking import (
    FORGETFUL_TEMPLATE,
    SCRIPT,
    TEMPLATE,
    build_tokenizer,
    greedy,
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


TEXT = {"role": "user", "content": "a"}
KEPT = {"messages": [TEXT], "text": "a", "plain": False}


@pytest.mark.parametrize(
    "conversation",
    [
        "",
        "null",
        "[]",
        "[" * 100_000,
        *(json.dumps({key: KEPT[key] for key in KEPT if key != name}) for name in KEPT),
        *(
            json.dumps({**KEPT, **changes})
            for changes in (
                {"messages": None},
                {"messages": {}},
                {"messages": ["a"]},
                {"messages": [{**TEXT, "content": None}]},
                {"messages": [{**TEXT, "more": "x"}]},
                {"messages": [{"role": "user"}]},
                {"messages": [{**TEXT, "content": "\ud800"}]},
                {"text": 3},
                {"text": "\udfff"},
                {"plain": "no"},
                {"plain": None},
            )
        ),
    ],
)
def test_altered_conversations_are_told(
    model,
    tokenizer_file,
    tmp_path,
    conversation,
):
    talking = Conversation(model, build_tokenizer(tokenizer_file, TEMPLATE))
    talk(talking, "one")
    talking.cache.save(tmp_path / "talk", metadata={"conversation": conversation})
    before = talking.cache
    with pytest.raises(ChatError, match=r"talk: no saved conversation \(found no messages and"):
        talking.load(tmp_path / "talk")
    assert talking.cache is before


def test_states_of_other_kinds_are_told(model, tokenizer_file, tmp_path):
    path = tmp_path / "talk"
    talking = Conversation(model, build_tokenizer(tokenizer_file))
    talk(talking, "one")
    talking.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    whole = load_file(path)

    def refused(message, change):
        save_file({k: x.contiguous() for k, x in change(whole).items()}, path, metadata=metadata)
        with pytest.raises(ChatError, match=f"^{path}: {message}"):
            talking.load(path)

    state = "layers.1.recurrent_states"
    refused(
        rf"no saved conversation \({state}: found none",
        lambda t: {k: x for k, x in t.items() if k != state},
    )
    refused(
        rf"no saved conversation \({state}: found torch.int64",
        lambda t: {**t, state: t[state].long()},
    )
    refused(
        "found 2 conversations, wanted one",
        lambda t: {k: x.repeat(2, *[1] * (x.ndim - 1)) for k, x in t.items()},
    )
    refused(
        "kept in torch.bfloat16, wanted torch.float32",
        lambda t: {k: x.bfloat16() if "conv" in k else x for k, x in t.items()},
    )
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "x" * 300, "a\0b"):
        with pytest.raises(ChatError):
            talking.load(tmp_path / name)
    for name in (".", "x" * 300, "a\0b", "none/x"):
        with pytest.raises(ChatError):
            talking.save(tmp_path / name)


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_conversation_is_taken_or_told(
    model,
    tokenizer_file,
    tmp_path,
    data,
):
    """After a file is loaded, another turn is answered or refused in a line."""
    talking = Conversation(model, build_tokenizer(tokenizer_file, TEMPLATE))
    talk(talking, "one", tokens=1)
    text = st.text(max_size=5) | st.sampled_from([END, "\ufdd0", "\ufdd0999\ufdd2", "user", "a"])
    message = st.dictionaries(st.sampled_from(["role", "content"]), text)
    value = st.recursive(st.none() | st.booleans() | text, lambda x: st.lists(x, max_size=2))
    kept = st.fixed_dictionaries(
        {
            "messages": st.lists(message, max_size=2) | value,
            "text": text | value,
            "plain": st.booleans(),
        }
    )
    conversation = data.draw(kept.map(json.dumps) | st.text(max_size=10))
    path = tmp_path / "talk"
    talking.cache.save(path, metadata={"conversation": conversation})
    raw = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=2)):
        raw[place] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        talking.load(path)
        talking.say("two", greedy, 1, lambda _: None)
    except ChatError as error:
        assert "\n" not in str(error)


def test_bytes_that_are_no_text_end_nothing(folder, tmp_path):
    """A terminal that cannot show the model's words does not end the chat either."""
    typed = b"hello\n\xff\xfe words\n/save talk\n/save a\x00b\n/save ~nobody-of-this-name/x\n"
    typed += b"/load /dev/zero\n/load talk\nmore\n/save \xff\n"
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
    assert "(found bytes that are not " in out and "(saved: " in out and "(loaded: " in out
    assert "(/dev/zero: no saved conversation (not a saved MetaLACache: no regular file))" in out


def test_a_closed_standard_input_is_an_empty_one(folder):
    command = f'"{sys.executable}" "{SCRIPT}" "{folder()}" <&-'
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"}
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
