"""What the commands of this folder share: errors, arguments, and the GPT-NeoX checkout."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_patch.architecture import SettingsError, one_line
from megatron_patch.commands.command_line import CommandError, told

ROOT = Path(__file__).resolve().parent.parent


class ConvertError(CommandError):
    """An error that the user can act on: one line that names the file, tensor or setting."""

    def __init__(self, line: str):
        super().__init__(one_line(line))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exits with code 1 and one line, `error: ...`, where a command cannot go on."""
    try:
        yield
    except (ConvertError, SettingsError, OSError) as error:
        sys.exit(f"error: {one_line(told(error))}")


def add_checkpoint_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments that choose a GPT-NeoX checkpoint to read."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="the folder that GPT-NeoX's `save` named"
    )
    parser.add_argument("--iteration", type=int, help="default: the latest")
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        metavar="YML",
        help="the run's settings, in place of those inside the checkpoint",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer.json or a tokenizer's folder, in place of the settings' vocab_file",
    )


def add_output_arguments(parser: ArgumentParser, kind: str) -> None:
    """Adds the arguments of the folder to write; `kind` says what sort of folder it is."""
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help=f"replace a {kind} folder that is there"
    )


def add_layout_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments of the parallel layout to write."""
    parser.add_argument("--tensor-parallel", type=int, required=True, metavar="N")
    parser.add_argument(
        "--pipeline-parallel",
        type=int,
        required=True,
        metavar="M",
        help="0 for mp_rank files, without a pipeline",
    )


def find_neox() -> Path | None:
    """Returns the checkout that `GPT_NEOX_PATH` names, else the one in third_party, else `None`.

    Raises:
        ConvertError: `GPT_NEOX_PATH` names a folder that is no GPT-NeoX checkout.
    """
    given = os.environ.get("GPT_NEOX_PATH")
    path = Path(given).resolve() if given else ROOT / "third_party" / "gpt-neox"
    if (path / "megatron" / "__init__.py").is_file():
        return path
    if given:
        raise ConvertError(f"GPT_NEOX_PATH={given} is no GPT-NeoX checkout")
    return None


def need_neox() -> Path:
    """Returns the GPT-NeoX checkout, as `find_neox` does.

    Raises:
        ConvertError: there is none.
    """
    path = find_neox()
    if path is None:
        raise ConvertError(
            "this needs GPT-NeoX: set GPT_NEOX_PATH to a checkout, or let scripts/setup.sh clone "
            f"one to {ROOT / 'third_party' / 'gpt-neox'}"
        )
    return path
