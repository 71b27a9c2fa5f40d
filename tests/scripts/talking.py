"""Chat templates, a tokenizer and turns of a conversation, which the tests of chat.py share."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Drops all but the last message; real templates drop earlier reasoning in the same way.
FORGETFUL_TEMPLATE = TEMPLATE.replace(
    "{{ m.content }}", "{{ m.content if loop.last else '(forgotten)' }}"
)
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + TEMPLATE
)
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "chat.py"


def build_tokenizer(tokenizer_file, template=None):
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>", chat_template=template
    )


def greedy(logits):
    return int(logits[2:].argmax()) + 2  # neither the end nor the padding token


def talk(conversation, *turns, tokens=5):
    answers = []
    for words in turns:
        ids = []
        turn = conversation.say(words, greedy, tokens, ids.append)
        answers.append((turn, ids))
    return answers
