#!/usr/bin/env python3
"""Chats with a MetaLA model, or lets it continue text. The model keeps its state between turns, so
each turn reads only the new words, however long the conversation is.

If the tokenizer has a chat template, each line you type is a message. Otherwise, and with --plain,
the model continues it as text. Ctrl-C ends an answer early.

    /reset   forget everything
    /quit    end (or Ctrl-D)
"""

from __future__ import annotations

import argparse
import copy
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from megatron_patch.commands.command_line import (
    CommandError,
    Parser,
    device,
    number,
    one_of,
    run_script,
    told,
    whole,
)
from megatron_patch.hf import MetaLACache, MetaLAForCausalLM

TOKENS_AT_ONCE = 4096  # a long text is read in pieces of this size, to bound the memory
DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_KEY = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"


class ChatError(Exception):
    """An error that the user can mend. The message says what is wrong; the chat goes on."""


@dataclass
class Turn:
    """The numbers of tokens that the model read and then wrote in a turn, and the time for both."""

    tokens_read: int
    tokens_written: int
    seconds: float


class Conversation:
    """A model, its state, and the text that led to the state.

    Args:
        system: system message, or the first line of plain text.
        plain: whether to ignore the chat template.

    Attributes:
        cache: the state after everything read so far.
        messages: the chat template's messages; empty for plain text.
        text: everything read so far.
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
        """Forgets everything except the system message."""
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
        """Reads the user's words and writes an answer, token by token. Raises a ChatError if the
        words cannot be read, or the model fails; the conversation is then as it was before.

        Args:
            words: what the user typed.
            choose: returns the next id for logits [vocab].
            max_new_tokens: longest answer.
            show: called with each id of the answer, without the end token.
            stopped: called before each token; returns whether to end the answer.
        """
        start = time.perf_counter()
        before = copy.deepcopy(self.cache), self.messages, self.text
        try:
            ids = self._new_ids(words)
            answer = []
            for token in self._write(ids, choose, max_new_tokens, stopped):
                answer.append(token)
                show(token)
            written = self.tokenizer.decode(answer, skip_special_tokens=True)
            self.text += written
        except BaseException as error:
            self.cache, self.messages, self.text = before
            if isinstance(error, (ValueError, RuntimeError)):  # the model's, e.g. out of memory
                raise ChatError(told(error)) from None
            raise
        if not self.plain:
            self.messages = [*self.messages, {"role": "assistant", "content": written}]
        return Turn(len(ids), len(answer), time.perf_counter() - start)

    def _new_ids(self, words: str) -> list[int]:
        """Returns the ids to read before the answer, after everything that was read already."""
        if self.plain:
            first = not self.text
            # Each turn is a new line of the text.
            new = f"{self.system}\n{words}" if first and self.system else words
            new = new if first else f"\n{new}"
            ids = self.tokenizer(new, add_special_tokens=first)["input_ids"]
            if first and ids and ids[-1] in self.end_ids:
                ids.pop()  # some tokenizers end every text
            if not ids:
                raise ChatError("nothing to read: the tokenizer makes no tokens of this")
            self.text += new
            return ids

        messages = [*self.messages, {"role": "user", "content": words}]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program
            raise ChatError(f"the chat template: {told(error)}") from None
        if text.startswith(self.text):
            new = text[len(self.text) :]
        else:
            # The template has changed earlier messages, and a recurrent state cannot be undone.
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
        """Reads `ids` and yields the ids of the answer, up to an end token."""
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
        """Advances the state by ids [1, T] and returns the logits [vocab] after the last id."""
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]


def _end_ids(model: MetaLAForCausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids that end an answer."""
    ids: set[int] = set()
    for found in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ids.update(found if isinstance(found, list) else [found])
    return ids - {None}


def chooser(temperature: float, top_p: float) -> Callable[[torch.Tensor], int]:
    """Returns a function that chooses the next id from logits [vocab]: the likeliest at temperature
    0, else a nucleus (top-p) sample. It raises a ChatError for NaN or infinite logits."""
    warp = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))] if temperature else [])
    if top_p < 1:
        warp.append(TopPLogitsWarper(top_p))

    def choose(logits: torch.Tensor) -> int:
        if not logits.isfinite().all():
            raise ChatError("the model gives NaN or infinity for the next token")
        if temperature == 0:
            return int(logits.argmax())
        # float64, with the maximum subtracted first: no temperature then gives NaN.
        scores = warp(None, (logits.double() - logits.max())[None])
        return int(torch.multinomial(scores.softmax(-1), 1))

    return choose


class CtrlC:
    """A context that records Ctrl-C instead of raising, because an exception inside a model call
    would leave the state half updated."""

    def __enter__(self) -> CtrlC:
        self.pressed = False
        self.before = signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, *_: object) -> None:
        self.pressed = True

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)


def lines() -> Iterator[str]:
    """Yields the lines of standard input, with a prompt at a terminal."""
    prompt = ""
    if sys.stdin is None:  # the shell closed it: <&-
        return
    if sys.stdin.isatty():
        import readline  # noqa: F401  editing and history for `input`

        prompt = "> "
    sys.stdin.reconfigure(errors="surrogateescape")  # `main` reports bytes that are not text
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            return


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    temperature = number(lambda x: x >= 0, "of 0 or more")
    top_p = number(lambda x: 0 < x <= 1, "above 0, at most 1")
    add = parser.add_argument
    add("folder", help="the model's folder, or its name on the Hub")
    add("--system", help="system message, or with --plain the text's first line")
    add("--max-new-tokens", type=whole(1), default=512, help="longest answer")
    add("--temperature", type=temperature, default=0.8, help="0: always the likeliest")
    add("--top-p", type=top_p, default=0.95, help="probability to draw from")
    add("--seed", type=whole(0), help="for the same answers again")
    add("--plain", action="store_true", help="plain text, without chat template")
    add("--stats", action="store_true", help="say after each turn what it took")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", type=one_of(DTYPES), default="auto", help="auto: the folder's")
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
    except Exception as error:  # transformers and its libraries raise many types
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
            if line.strip() == "/quit":
                break
            if line.strip() == "/reset":
                conversation.reset()
                print("(all forgotten)")
            elif re.match(r"/\w+(\s|$)", line):
                raise ChatError(f"{line.split()[0]}: no such command; there are /reset and /quit")
            elif line.strip():
                if re.search("[\ud800-\udfff]", line):
                    raise ChatError(f"found bytes that are not {sys.stdin.encoding}, wanted text")
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
