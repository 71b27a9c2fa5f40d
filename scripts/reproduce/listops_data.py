"""ListOps expressions (Nangia and Bowman, arXiv 1804.06028), as in Long Range Arena (Tay et al.,
arXiv 2011.04006): an own generator, and a reader of the published files.

An expression is an operator with its arguments, digits or expressions again, such as
`[MAX 4 3 [MIN 2 3 ] 1 0 ]` with the value 4. MED is the median, rounded down; SM is the sum modulo
10. Long Range Arena's settings are the defaults of `Shape`.
"""

from __future__ import annotations

import csv
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from classifier import PAD

from megatron_patch.commands.command_line import CommandError

TOKENS = ["", "[MIN", "[MAX", "[MED", "[SM", "]", *map(str, range(10))]
VALUES = 10
OPERATORS, END, FIRST_DIGIT = 4, TOKENS.index("]"), TOKENS.index("0")
IN_A_BLOCK = 500  # expressions that one process draws from one seed


@dataclass(frozen=True)
class Shape:
    """What is drawn.

    Attributes:
        depth: an operator lies at a depth below this; the outermost one has 1.
        arguments: an operator has 2 to this many, each an expression with probability 1/4.
        shortest, longest: the fewest and the most tokens. Others are drawn again.
    """

    depth: int = 10
    arguments: int = 10
    shortest: int = 501
    longest: int = 1999


class _TooLong(Exception):
    pass


def draw_expression(shape: Shape, rng: random.Random) -> tuple[list[int], int]:
    """Returns the tokens of a random expression, and its value."""
    while True:
        tokens: list[int] = []
        try:
            value = _draw_operator(shape, rng, tokens, 1)
        except _TooLong:
            continue
        if shape.shortest <= len(tokens) <= shape.longest:
            return tokens, value


def _draw_operator(shape: Shape, rng: random.Random, tokens: list[int], depth: int) -> int:
    """Appends an operator with its arguments to `tokens`, and returns its value."""
    if len(tokens) > shape.longest:
        raise _TooLong
    operator = 1 + int(OPERATORS * rng.random())
    tokens.append(operator)
    values = []
    for _ in range(rng.randint(2, shape.arguments)):
        if depth + 1 < shape.depth and rng.random() < 0.25:
            values.append(_draw_operator(shape, rng, tokens, depth + 1))
        else:
            values.append(int(VALUES * rng.random()))
            tokens.append(FIRST_DIGIT + values[-1])
    tokens.append(END)
    return _apply(operator, values)


def _apply(operator: int, values: list[int]) -> int:
    name = TOKENS[operator]
    if name == "[MIN":
        return min(values)
    if name == "[MAX":
        return max(values)
    if name == "[MED":
        ordered, half = sorted(values), len(values) // 2
        return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2
    return sum(values) % 10


def evaluate(tokens: list[int]) -> int:
    """Returns the value of an expression. Raises a ValueError if it is none."""
    stack: list[list[int]] = [[]]
    for token in tokens:
        if 1 <= token <= OPERATORS:
            stack.append([token])
        elif token == END and len(stack) > 1 and len(stack[-1]) > 1:
            operator, *values = stack.pop()
            stack[-1].append(_apply(operator, values))
        elif token >= FIRST_DIGIT:
            stack[-1].append(token - FIRST_DIGIT)
        else:
            raise ValueError("found an end without an operator and arguments before it")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError("found no whole expression")
    return stack[0][0]


def _draw_block(shape: Shape, seed: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = random.Random(f"{seed} {block}")
    return pack([draw_expression(shape, rng) for _ in range(IN_A_BLOCK)], shape.longest)


def pack(examples: list[tuple[list[int], int]], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens, uint8 [N, longest] with PAD behind each expression, and the values,
    uint8 [N]."""
    tokens = torch.full((len(examples), longest), PAD, dtype=torch.uint8)
    for row, (expression, _) in zip(tokens, examples, strict=True):
        row[: len(expression)] = torch.tensor(expression, dtype=torch.uint8)
    return tokens, torch.tensor([value for _, value in examples], dtype=torch.uint8)


def draw(shape: Shape, count: int, seed: int, processes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `count` expressions as `pack` does. They do not depend on the number of processes."""
    blocks = range(-(-count // IN_A_BLOCK))
    draw_block = partial(_draw_block, shape, seed)
    if processes == 1 or len(blocks) == 1:
        parts = [draw_block(block) for block in blocks]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            parts = list(pool.map(draw_block, blocks))
    tokens, values = (torch.cat(found)[:count] for found in zip(*parts, strict=True))
    return tokens, values


def read_tsv(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the expressions of a published file (`basic_train.tsv` and so on) as `pack` does.

    A line holds an expression and its value. The parentheses in it, which join an operator with one
    argument after the other, say nothing that the brackets do not say, and are dropped. Raises a
    CommandError that names the line that is no such thing.
    """
    numbers = {text: number for number, text in enumerate(TOKENS) if text}
    examples = []
    with path.open(encoding="utf-8", newline="") as file:
        for count, line in enumerate(csv.reader(file, delimiter="\t"), 1):
            if count == 1 and line == ["Source", "Target"]:
                continue
            try:
                source, target = line
                words = source.replace("(", " ").replace(")", " ").split()
                tokens, value = [numbers[word] for word in words], int(target)
                found = evaluate(tokens)
            except (KeyError, ValueError):
                raise CommandError(
                    f"{path}:{count}: wanted an expression, a tab and its value"
                ) from None
            if found != value:
                raise CommandError(f"{path}:{count}: found the value {value}, wanted {found}")
            examples.append((tokens, value))
    if not examples:
        raise CommandError(f"{path}: found no expressions")
    return pack(examples, max(len(tokens) for tokens, _ in examples))
