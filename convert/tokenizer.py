"""The tokenizer of a training run, and the files that make it a Hugging Face tokenizer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from convert.command import ConvertError, find_neox
from convert.files import check_regular, read_json, read_text, refusing, write_json
from megatron_patch.architecture_neox import why_tokenizer_not_exportable
from megatron_patch.commands.command_line import first_line

# The files that transformers saves for a tokenizer.
TOKENIZER_FILES = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    vocab.txt merges.txt tokenizer.model spiece.model chat_template.jinja
""".split()
# A tokenizer.json does not say which tokens are special in what way, so they are found by their
# usual names. GPT-NeoX ends documents with <|endoftext|> and has no token for their beginning, so a
# text begins after the end of the document before it.
END = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]")
BEGIN = ("<|startoftext|>", "<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "<|endoftext|>")
PADDING = ("<|padding|>", "<pad>", "<|pad|>", "[PAD]")
# What a tokenizer does for this model: most code that generates from batches expects padding on the
# left, and transformers 4's `generate` refuses `token_type_ids`, which the model does not read.
FOR_METALA = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}


@dataclass(frozen=True)
class RunTokenizer:
    """A run's tokenizer.

    Attributes:
        source: its tokenizer.json, or its folder.
        size: number of tokens, as GPT-NeoX counts them before padding.
        special: `bos_token_id`, `eos_token_id` and `pad_token_id`; `None` if it has no such token.
        write: writes its files into a folder.
    """

    source: Path
    size: int
    special: dict[str, int | None]
    write: Callable[[Path], None]


def find_tokenizer(given: Path | None, args: SimpleNamespace) -> Path:
    """Returns the tokenizer.json or the folder that is given, else the one in the settings.

    A relative `vocab_file` is looked up in the current folder and in the GPT-NeoX checkout, one of
    which the training was started in. Raises a ConvertError if there is none.
    """
    if given is not None:
        if not _exists(given):
            raise ConvertError(f"--tokenizer {given}: no such file or folder")
        return given
    for name, found, wanted in why_tokenizer_not_exportable(args):
        raise ConvertError(f"{name}: found {found}, wanted {wanted}")
    path = Path(os.path.expanduser(args.vocab_file))
    if _exists(path):
        return path
    checkout = None if path.is_absolute() else find_neox()
    if checkout and _exists(checkout / path):
        return checkout / path
    raise ConvertError(
        f"vocab_file {args.vocab_file} of the settings is not there; give the tokenizer by "
        "--tokenizer (tokenizer.json, or its folder)"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # the name is too long, or holds NUL
        return False


def read_tokenizer(source: Path) -> RunTokenizer:
    """Returns the tokenizer of a tokenizer.json, or of a folder that transformers can load. Raises
    a ConvertError if it cannot be read."""
    return _from_folder(source) if source.is_dir() else read_tokenizer_file(source)


def read_tokenizer_file(
    path: Path,
    begin: Sequence[str] = BEGIN,
    end: Sequence[str] = END,
    padding: Sequence[str] = PADDING,
) -> RunTokenizer:
    """Returns the tokenizer of a tokenizer.json. The first of each sequence that it has begins a
    text, ends one, and pads. Raises a ConvertError if the file cannot be read."""
    from tokenizers import Tokenizer

    text = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ConvertError(f"{path}: no tokenizer.json: {error}") from None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    chosen = {
        "bos_token": _first(begin, vocabulary),
        "eos_token": _first(end, vocabulary),
        "pad_token": _first(padding, vocabulary),
    }
    names = {key: token for key, token in chosen.items() if token is not None}

    def write(folder: Path) -> None:
        (folder / "tokenizer.json").write_bytes(text.encode())
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "clean_up_tokenization_spaces": False,  # true would change decoded text
            **FOR_METALA,
        }
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", names)

    special = {f"{key}_id": vocabulary.get(token) for key, token in chosen.items()}
    return RunTokenizer(path, _size(vocabulary), special, write)


def load_tokenizer(folder: Path) -> Any:
    """Returns the transformers tokenizer of a folder, without running code of the folder and
    without reading files outside of it. Raises a ConvertError if there is none, it needs code of
    its own, or an entry of the folder is no regular file or a link out of it."""
    from transformers import AutoTokenizer

    with refusing(folder):
        entries = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]
    for path in sorted(entries):
        if not path.is_dir():
            check_regular(path, folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        wanted = "wanted tokenizer.json or the like, or a tokenizer that --tokenizer names"
        raise ConvertError(f"{folder}: holds no tokenizer, {wanted}")
    config = folder / "tokenizer_config.json"
    values = read_json(config, folder) if config.is_file() else {}
    for key, value in values.items():
        if key == "auto_map":
            raise ConvertError(f"{config}: auto_map: the tokenizer needs code of its own")
        # transformers 4 opens the files that these keys name, wherever they are.
        if key.endswith("_file") and isinstance(value, str) and _exists(folder / value):
            check_regular(folder / value, folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizer classes raise errors of all kinds
        raise ConvertError(f"{folder}: holds no tokenizer: {first_line(error)}") from None


def _from_folder(folder: Path) -> RunTokenizer:
    tokenizer = load_tokenizer(folder)

    def write(target: Path) -> None:
        for name in TOKENIZER_FILES:
            if os.path.lexists(folder / name):
                shutil.copyfile(check_regular(folder / name, folder), target / name)
        config = target / "tokenizer_config.json"
        values = read_json(config, target) if config.is_file() else {}
        write_json(config, {**values, **FOR_METALA})

    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {key: getattr(tokenizer, key) for key in keys}
    return RunTokenizer(folder, _size(tokenizer.get_vocab()), special, write)


def _size(vocabulary: dict[str, int]) -> int:
    """Returns the rows that the tokens need: GPT-NeoX counts tokens, but ids may have gaps."""
    return max(len(vocabulary), max(vocabulary.values(), default=-1) + 1)


def _first(candidates: Sequence[str], vocabulary: dict[str, int]) -> str | None:
    return next((token for token in candidates if token in vocabulary), None)
