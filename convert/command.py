"""The error, the arguments and the GPT-NeoX checkout that the commands of this folder share."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_patch.architecture import one_line
from megatron_patch.commands.command_line import CommandError, Parser, whole

ROOT = Path(__file__).resolve().parent.parent


class ConvertError(CommandError):
    """An error that the user can act on: one line that names the file, tensor or setting."""

    def __init__(self, line: str):
        super().__init__(one_line(line))


def command_parser(
    description: str, output: str, reads_checkpoint: bool = False, takes_layout: bool = False
) -> Parser:
    """Returns a parser with the arguments that commands share, for a command that writes a folder
    of the kind `output`, and may read a GPT-NeoX checkpoint or write for a given layout."""
    parser = Parser(description=description.splitlines()[0])
    add = parser.add_argument
    if reads_checkpoint:
        saved = "the folder that GPT-NeoX's `save` named"
        add("--checkpoint", type=Path, required=True, help=saved)
        add("--iteration", type=whole(0), metavar="N", help="default: the latest")
        config = "the run's settings, in place of those inside the checkpoint"
        add("--config", type=Path, nargs="+", metavar="YML", help=config)
    owner = "the settings' vocab_file" if reads_checkpoint else "the model's own"
    tokenizer = f"tokenizer.json or a tokenizer's folder, in place of {owner}"
    add("--tokenizer", type=Path, help=tokenizer)
    add("--output", type=Path, required=True, help="the folder to write")
    add("--overwrite", action="store_true", help=f"replace a {output} folder that is there")
    if takes_layout:
        stages = "0 for mp_rank files, without a pipeline"
        add("--tensor-parallel", type=whole(1), required=True, metavar="N")
        add("--pipeline-parallel", type=whole(0), required=True, metavar="M", help=stages)
    return parser


def find_neox() -> Path | None:
    """Returns the checkout that `GPT_NEOX_PATH` names, else the one in third_party, else `None`.
    Raises a ConvertError if `GPT_NEOX_PATH` names a folder that is no GPT-NeoX checkout."""
    given = os.environ.get("GPT_NEOX_PATH")
    path = Path(given).resolve() if given else ROOT / "third_party" / "gpt-neox"
    if (path / "megatron" / "__init__.py").is_file():
        return path
    if given:
        raise ConvertError(f"GPT_NEOX_PATH={given} is no GPT-NeoX checkout")
    return None


def need_neox() -> Path:
    """Returns the GPT-NeoX checkout, as `find_neox` does. Raises a ConvertError if there is
    none."""
    path = find_neox()
    if path is None:
        raise ConvertError(
            "this needs GPT-NeoX: set GPT_NEOX_PATH to a checkout, or let scripts/setup.sh clone "
            f"one to {ROOT / 'third_party' / 'gpt-neox'}"
        )
    return path
