"""The tokenizer of a training run, and the files that make it a Hugging Face tokenizer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from convert.command import ConvertError
from convert.gpt_neox import find_neox
from convert.inputs import check_regular, read_json, read_text, refusing
from convert.json_file import write_json
from megatron_patch.architecture_neox import why_tokenizer_not_exportable

# What transformers saves for a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
# Names that tokenizer.json files give to the special tokens, the commonest first. GPT-NeoX itself
# ends documents with <|endoftext|> and knows no token for their beginning: the end of the document
# before is what a text starts after.
END = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]")
BEGIN = ("<|startoftext|>", "<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "<|endoftext|>")
PADDING = ("<|padding|>", "<pad>", "<|pad|>", "[PAD]")
# As most code that continues batches takes for granted, whatever model they are for.
PADDING_SIDE = "left"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens; `None` where the tokenizer has none."""

    bos: int | None
    eos: int | None
    pad: int | None


@dataclass(frozen=True)
class RunTokenizer:
    """A run's tokenizer.

    Attributes:
        source: its tokenizer.json, or its folder.
        size: number of tokens, as GPT-NeoX counts them before padding.
        special: ids of the special tokens.
        write: writes its files into a folder.
    """

    source: Path
    size: int
    special: SpecialTokens
    write: Callable[[Path], None]


def find_tokenizer(given: Path | None, args: SimpleNamespace) -> Path:
    """The tokenizer.json or tokenizer folder: the one given, else that of the settings.

    A relative `vocab_file` counts from the folder the training started in: the current one or the
    GPT-NeoX checkout.

    Raises:
        ConvertError: there is none.
    """
    if given is not None:
        if not _is_there(given):
            raise ConvertError(f"--tokenizer {given}: no such file or folder")
        return given
    for name, found, wanted in why_tokenizer_not_exportable(args):
        raise ConvertError(f"{name}: found {found}, wanted {wanted}")
    path = Path(os.path.expanduser(args.vocab_file))
    if _is_there(path):
        return path
    checkout = None if path.is_absolute() else find_neox()
    if checkout and _is_there(checkout / path):
        return checkout / path
    raise ConvertError(
        f"vocab_file {args.vocab_file} of the settings is not there; give the tokenizer by "
        "--tokenizer (tokenizer.json, or its folder)"
    )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # of a name that no file can have
        return False


def read_tokenizer(source: Path) -> RunTokenizer:
    """The tokenizer of a tokenizer.json or of a folder that transformers can load.

    Raises:
        ConvertError: it cannot be read.
    """
    return _from_folder(source) if source.is_dir() else _from_file(source)


def _from_file(path: Path) -> RunTokenizer:
    from tokenizers import Tokenizer

    text = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain exceptions
        raise ConvertError(f"{path}: no tokenizer.json: {error}") from None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    chosen = {
        "bos_token": _first(BEGIN, vocabulary),
        "eos_token": _first(END, vocabulary),
        "pad_token": _first(PADDING, vocabulary),
    }
    names = {key: token for key, token in chosen.items() if token is not None}

    def write(folder: Path) -> None:
        (folder / "tokenizer.json").write_bytes(text.encode())
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "clean_up_tokenization_spaces": False,  # it would change the text
            "padding_side": PADDING_SIDE,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", names)

    ids = [vocabulary.get(chosen[key]) for key in ("bos_token", "eos_token", "pad_token")]
    return RunTokenizer(path, _size(vocabulary), SpecialTokens(*ids), write)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, as transformers has it. Code of the folder does not run, and
    nothing is read that lies elsewhere.

    Raises:
        ConvertError: there is none, it needs code of its own, or an entry of the folder is no
            regular file, or leads out of it.
    """
    from transformers import AutoTokenizer

    with refusing(folder):
        entries = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]
    for path in sorted(entries):
        if not path.is_dir():
            check_regular(path, folder)
    config = folder / "tokenizer_config.json"
    values = read_json(config, folder) if config.is_file() else {}
    for key, value in values.items():
        if key == "auto_map":
            raise ConvertError(f"{config}: auto_map: the tokenizer needs code of its own")
        # transformers 4 opens what these name, wherever it is.
        if key.endswith("_file") and isinstance(value, str) and _is_there(folder / value):
            check_regular(folder / value, folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer class raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConvertError(f"{folder}: holds no tokenizer: {reason}") from None


def _from_folder(folder: Path) -> RunTokenizer:
    tokenizer = load_tokenizer(folder)

    def write(target: Path) -> None:
        for name in TOKENIZER_FILES:
            if os.path.lexists(folder / name):
                shutil.copyfile(check_regular(folder / name, folder), target / name)
        config = target / "tokenizer_config.json"
        values = read_json(config, target) if config.is_file() else {}
        write_json(config, {**values, "padding_side": PADDING_SIDE})

    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return RunTokenizer(folder, _size(tokenizer.get_vocab()), SpecialTokens(*ids), write)


def _size(vocabulary: dict[str, int]) -> int:
    """GPT-NeoX counts tokens; ids with gaps between them need more rows than that."""
    return max(len(vocabulary), max(vocabulary.values(), default=-1) + 1)


def _first(candidates: Sequence[str], vocabulary: dict[str, int]) -> str | None:
    return next((token for token in candidates if token in vocabulary), None)
