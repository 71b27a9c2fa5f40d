#!/usr/bin/env python3
"""Talks with a MetaLA model, or lets it continue text. The model's state is carried from turn to
turn: each one reads the new words alone, however long the conversation has become.

If the tokenizer has a chat template, a line that is typed is a message of the user. Otherwise, and
with --plain, it is text that the model continues. Ctrl-C ends an answer early.

    /reset       forget everything
    /save FILE   keep the conversation, as the model remembers it
    /load FILE   go on with a conversation that was kept
    /quit        end (or Ctrl-D)
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from command_line import CommandError, Parser, device, number, one_of, run_script, told, whole
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from megatron_patch.hf import MetaLACache, MetaLAForCausalLM

TOKENS_AT_ONCE = 4096  # of a long text, so that reading it takes bounded memory
COMMANDS = ("/reset", "/save", "/load", "/quit")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_KEY = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"


class ChatError(Exception):
    """Something that the user can mend; the message says what."""


@dataclass
class Turn:
    """What one answer took.

    tokens_read: how many tokens were fed before the first one was written.
    tokens_written: how many were written.
    seconds: for both.
    """

    tokens_read: int
    tokens_written: int
    seconds: float


class Conversation:
    """A model with its state, and the text that has led to it.

    Attributes:
        cache: the state after all that was read.
        messages: of the chat template; empty for plain text.
        text: the same as text.
    """

    def __init__(
        self,
        model: MetaLAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        plain: bool = False,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.plain = plain or not tokenizer.chat_template
        self.end_ids = _end_ids(model, tokenizer)
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.cache = MetaLACache(self.model.config, decoding_graph="eager")
        self.messages = []
        self.text = ""
        if self.system and not self.plain:
            self.messages.append({"role": "system", "content": self.system})

    def say(
        self,
        words: str,
        choose: Callable[[torch.Tensor], int],
        max_new_tokens: int,
        show: Callable[[int], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> Turn:
        """Reads the user's words and writes an answer, token by token.

        Args:
            words: what the user typed.
            choose: the next id from logits [vocab].
            max_new_tokens: longest answer.
            show: called with each id that is written, the end token excluded.
            stopped: asked before each token whether to end the answer there.
        """
        start = time.perf_counter()
        ids = self._new_ids(words)
        answer = []
        for token in self._write(ids, choose, max_new_tokens, stopped):
            answer.append(token)
            show(token)
        written = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.text += written
        if not self.plain:
            self.messages.append({"role": "assistant", "content": written})
        return Turn(len(ids), len(answer), time.perf_counter() - start)

    def _new_ids(self, words: str) -> list[int]:
        """The ids that take the state from all before to the start of the answer."""
        if self.plain:
            first = not self.text
            # A turn is a new line of the text.
            new = f"{self.system}\n{words}" if first and self.system else words
            new = new if first else f"\n{new}"
            ids = self.tokenizer(new, add_special_tokens=first)["input_ids"]
            if first and ids and ids[-1] in self.end_ids:
                ids.pop()  # of a tokenizer that ends every text
            if not ids:
                raise ChatError("nothing to read: the tokenizer makes no tokens of this")
            self.text += new
            return ids

        messages = [*self.messages, {"role": "user", "content": words}]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ChatError(f"the chat template: {error}") from None
        if text.startswith(self.text):
            new = text[len(self.text) :]
        else:
            # The template has changed what was said before; a state cannot be taken back.
            print("(the chat template rewrites earlier turns: reading all again)", file=sys.stderr)
            self.cache.reset()
            new = text
        self.messages, self.text = messages, text
        return self.tokenizer(new, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def _write(
        self,
        ids: list[int],
        choose: Callable[[torch.Tensor], int],
        max_new_tokens: int,
        stopped: Callable[[], bool],
    ) -> Iterator[int]:
        """Reads `ids` and yields what follows, up to an end token."""
        for piece in torch.tensor([ids], device=self.model.device).split(TOKENS_AT_ONCE, dim=1):
            logits = self._read(piece)
        for _ in range(max_new_tokens):
            if stopped():
                return
            token = choose(logits)
            if token in self.end_ids:
                return
            yield token
            logits = self._read(torch.tensor([[token]], device=self.model.device))

    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        """Takes ids [1, T] into the state; the logits [vocab] after the last."""
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]

    def save(self, path: Path) -> None:
        """Writes the state and the text to a safetensors file."""
        kept = {"messages": self.messages, "text": self.text, "plain": self.plain}
        try:
            self.cache.save(path, metadata={"conversation": json.dumps(kept)})
        except (OSError, SafetensorError) as error:
            raise ChatError(f"{path}: {error}") from None

    def load(self, path: Path) -> None:
        """Goes on where the conversation in a file ended.

        Raises:
            ChatError: the file is missing, is something else, or is of another model.
        """
        try:
            cache = MetaLACache.load(path, device=self.model.device)
            with safe_open(path, framework="pt") as file:
                kept = json.loads(file.metadata()["conversation"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ChatError(f"{path}: no saved conversation ({error})") from None
        config = self.model.config
        heads, width = config.num_attention_heads, config.head_value_dim
        keys = [1, config.num_key_value_heads, cache.get_seq_length(), width]
        wanted = {
            "conv_states": [1, config.hidden_size, config.conv_width - 1],
            "recurrent_states": [1, heads, config.head_key_dim, width],
            "keys": keys,
            "values": keys,
        }
        found = [(name, list(x.shape)) for layer in cache.layers for name, x in layer.tensors()]
        kinds = [[layer.layer_type for layer in c.layers] for c in (cache, MetaLACache(config))]
        if kinds[0] != kinds[1] or any(shape != wanted[name] for name, shape in found):
            raise ChatError(f"{path}: the conversation of another model")
        if kept["plain"] != self.plain:
            raise ChatError(f"{path}: kept {'with' if kept['plain'] else 'without'} --plain")
        cache.decoding_graph = self.cache.decoding_graph
        self.cache, self.messages, self.text = cache, kept["messages"], kept["text"]


def _end_ids(model: MetaLAForCausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end an answer."""
    ids: set[int] = set()
    for found in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ids.update(found if isinstance(found, list) else [found])
    return ids - {None}


def chooser(temperature: float, top_p: float) -> Callable[[torch.Tensor], int]:
    """How the next id is chosen from logits [vocab]: the likeliest at temperature 0, else at random
    from the likeliest that have `top_p` of the probability together."""
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    warp = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_p < 1:
        warp.append(TopPLogitsWarper(top_p))

    def choose(logits: torch.Tensor) -> int:
        scores = warp(None, logits.float()[None])
        return int(torch.multinomial(scores.softmax(-1), 1))

    return choose


class CtrlC:
    """Notes Ctrl-C while it is entered: between two tokens the state is whole, within a model call
    it is not."""

    def __enter__(self) -> CtrlC:
        self.pressed = False
        self.before = signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, *_: object) -> None:
        self.pressed = True

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)


def lines() -> Iterator[str]:
    """What is typed, or comes from a file or a pipe, up to its end."""
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401  editing and history for `input`

        prompt = "> "
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            return


def obey(command: str, conversation: Conversation) -> bool:
    """Runs a command; returns whether to go on."""
    name, _, argument = command.partition(" ")
    argument = argument.strip()
    if name == "/quit":
        return False
    if name not in COMMANDS:
        raise ChatError(f"{name}: no such command; there are {', '.join(COMMANDS)}")
    if name == "/reset":
        conversation.reset()
        print("(all forgotten)")
        return True
    if not argument:
        raise ChatError(f"{name}: wanted the name of a file after it")
    getattr(conversation, name[1:])(Path(argument).expanduser())
    print(f"({'saved' if name == '/save' else 'loaded'}: {conversation.cache!r})")
    return True


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    temperature = number(lambda x: x >= 0, "of 0 or more")
    top_p = number(lambda x: 0 < x <= 1, "above 0, at most 1")
    parser.add_argument("folder", help="the model's folder, or its name on the Hub")
    parser.add_argument("--system", help="system message, or with --plain the text's first line")
    parser.add_argument("--max-new-tokens", type=whole(1), default=512, help="longest answer")
    parser.add_argument(
        "--temperature", type=temperature, default=0.8, help="0: always the likeliest"
    )
    parser.add_argument("--top-p", type=top_p, default=0.95, help="probability to draw from")
    parser.add_argument("--seed", type=whole(0), help="for the same answers again")
    parser.add_argument("--plain", action="store_true", help="plain text, without chat template")
    parser.add_argument("--stats", action="store_true", help="say after each turn what it took")
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", type=one_of(DTYPES), default="auto", help="auto: the folder's")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            arguments.folder, trust_remote_code=False, **{DTYPE_KEY: arguments.dtype}
        )
    except Exception as error:  # transformers and its libraries have many kinds
        raise CommandError(
            f"folder: found {arguments.folder} ({told(error)}), wanted a MetaLA model"
        ) from None
    if not isinstance(model, MetaLAForCausalLM):
        found = type(model).__name__
        raise CommandError(f"folder: found {arguments.folder}, a {found}, wanted a MetaLA model")
    model = model.to(arguments.device).eval()
    conversation = Conversation(model, tokenizer, arguments.system, arguments.plain)
    choose = chooser(arguments.temperature, arguments.top_p)

    for line in lines():
        try:
            if re.match(r"/\w+(\s|$)", line):
                if not obey(line.strip(), conversation):
                    break
            elif line.strip():
                streamer = TextStreamer(tokenizer, skip_special_tokens=True)
                with CtrlC() as ctrl_c:
                    turn = conversation.say(
                        line,
                        choose,
                        arguments.max_new_tokens,
                        lambda token, out=streamer: out.put(torch.tensor([token])),
                        lambda pressed=ctrl_c: pressed.pressed,
                    )
                streamer.end()
                if arguments.stats:
                    print(
                        f"({turn.tokens_read} tokens read, {turn.tokens_written} written, "
                        f"{turn.seconds:.1f} s)"
                    )
        except ChatError as error:
            print(f"({error})")


if __name__ == "__main__":
    run_script(main)
