"""Reading and writing the weights and configuration of Hugging Face folders, tensor by tensor."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from convert.command import ConvertError
from convert.export_record import check_record
from convert.files import (
    DTYPES,
    check_bytes,
    check_regular,
    load_torch_file,
    plain_tensors,
    read_json,
    write_json,
)
from convert.tensor_table import Split, TensorRule, check_finite, fit_vocabulary, tensor_table
from megatron_patch.architecture import Architecture, shown
from megatron_patch.commands.command_line import refuse
from megatron_patch.hf import MetaLAConfig

# The files in which transformers saves weights; the first that is there is read.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class HFFolder:
    """A model's configuration and weights, the authors' or ours, checked when it is opened.

    One weight file at a time is open, memory-mapped. Raises a ConvertError if a file is missing or
    damaged, GPT-NeoX has no such model, or a tensor is missing, unexpected or of another shape.

    Attributes:
        shape: the model's shape, with a vocabulary without padding.
        dtypes: the dtype of each tensor by name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = _read_config(folder)
        self.shape = Architecture.from_hf(self.config)
        self._opened: tuple[Path, Mapping[str, torch.Tensor] | Any] | None = None
        self._files = self._find_tensors()
        self._compared: set[str] = set()
        check_record(folder, sorted({path.name for path in self._files.values()}))
        self.dtypes = self._check_tensors()
        # GPT-NeoX does not scale embeddings, so the scale goes into the weights.
        self._embed_scale = 1.0 if self.config.no_scale_embedding else self.shape.hidden_size**0.5

    def full(self, rule: TensorRule) -> torch.Tensor:
        """Returns a GPT-NeoX tensor over all ranks. The rule may be of a table with a padded
        vocabulary, whose padding rows become zeros."""
        tensors = {piece.name: self._tensor(piece.name) for piece in rule.pieces}
        if rule.split is not Split.VOCAB:
            return rule.from_hf(tensors)
        ((name, tensor),) = tensors.items()
        if name == EMBEDDING and self._embed_scale != 1.0:
            tensor = tensor * self._embed_scale  # rounded as the model rounds each product
        return fit_vocabulary(tensor, rule.shape[0])

    def _find_tensors(self) -> dict[str, Path]:
        """Returns the file of each tensor."""
        name = next((n for n in WEIGHT_FILES if os.path.lexists(self.folder / n)), None)
        if name is None:
            raise ConvertError(
                f"{self.folder}: holds no weights: none of {', '.join(WEIGHT_FILES)}"
            )
        path = self.folder / name
        if not name.endswith(".json"):
            return dict.fromkeys(self._names(path), path)
        index = read_json(path, self.folder).get("weight_map")
        if not isinstance(index, dict):
            raise ConvertError(f"{path}: no index of weights: it has no weight_map")
        files = {tensor: self.folder / str(file) for tensor, file in index.items()}
        for file in sorted(set(files.values())):
            announced = {tensor for tensor, its_file in files.items() if its_file == file}
            found = set(self._names(file))
            for tensor in sorted(announced ^ found):
                says = "names it there" if tensor in announced else "does not name it there"
                has = "has no" if tensor in announced else "has"
                raise ConvertError(f"{file}: {has} tensor {tensor}, but {path.name} {says}")
        return files

    def _check_tensors(self) -> dict[str, torch.dtype]:
        """Checks names, shapes and dtypes against the table, and returns the dtypes."""
        if self.shape.num_layers > len(self._files):
            raise ConvertError(
                f"{self.folder}: config.json has decoder_layers {self.shape.num_layers}, but there "
                f"are {len(self._files)} tensors alone"
            )
        table = tensor_table(self.shape)
        wanted = {piece.name: piece.shape for rule in table for piece in rule.pieces}
        for name in sorted(wanted.keys() - self._files.keys()):
            raise ConvertError(f"{self.folder}: {name} is missing")
        for name in sorted(self._files.keys() - wanted.keys()):
            if not (name == HEAD and self.shape.tied):
                raise ConvertError(f"{self._files[name]}: {name} is no tensor of this model")
            if not torch.equal(self._tensor(name), self._tensor(EMBEDDING)):
                raise ConvertError(
                    f"{self._files[name]}: {name} differs from {EMBEDDING}, but config.json says "
                    "tie_word_embeddings: true"
                )
        dtypes = {}
        for name, shape in wanted.items():
            tensor = self._tensor(name)
            if tuple(tensor.shape) != shape:
                raise ConvertError(
                    f"{self._files[name]}: {name} has shape {tuple(tensor.shape)}, wanted {shape}"
                )
            dtypes[name] = tensor.dtype
        for rule in table:
            kinds = sorted({str(dtypes[piece.name]) for piece in rule.pieces})
            if len(kinds) > 1:
                names = ", ".join(piece.name for piece in rule.pieces)
                raise ConvertError(f"{self.folder}: {names} have dtypes {kinds}, wanted one")
            if dtypes[rule.pieces[0].name] not in DTYPES:
                raise ConvertError(
                    f"{self.folder}: {rule.pieces[0].name} is {kinds[0]}, wanted floating point"
                )
        return dtypes

    def _names(self, path: Path) -> list[str]:
        return list(self._open(path).keys())

    def _tensor(self, name: str) -> torch.Tensor:
        opened = self._open(self._files[name])
        if not isinstance(opened, Mapping):
            return opened.get_tensor(name)
        if name not in self._compared:
            check_bytes(self._files[name], name, opened[name])
            self._compared.add(name)
        return opened[name]

    def _open(self, path: Path) -> Any:
        """Returns an open safetensors file, or the tensors of a PyTorch file by name."""
        if self._opened is None or self._opened[0] != path:
            self._opened = None  # closes the file before the next one is opened
            self._opened = (path, _open_weights(path, self.folder))
        return self._opened[1]


def _open_weights(path: Path, folder: Path) -> Any:
    check_regular(path, folder)
    if path.suffix == ".safetensors":
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConvertError(f"{path}: truncated or no safetensors file: {error}") from None
    return plain_tensors(load_torch_file(path, folder), path)


def _read_config(folder: Path) -> MetaLAConfig:
    """Returns the configuration if GPT-NeoX has such a model."""
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    if adapter.exists() and not path.exists():
        raise ConvertError(f"{adapter}: found an adapter, wanted it merged (merge_and_unload)")
    values = read_json(path, folder)
    kind = values.get("model_type")
    if kind != "metala":
        raise ConvertError(f"{path}: model_type: found {shown(kind)}, wanted metala")
    try:
        config = MetaLAConfig(**values)
    except Exception as error:  # transformers' type checks raise errors of many kinds
        raise ConvertError(f"{path}: {' '.join(str(error).split())}") from None
    if config.bias:
        raise ConvertError(f"{path}: bias: found true, wanted false: the MLP has none in GPT-NeoX")
    if config.tie_word_embeddings and not config.no_scale_embedding:
        raise ConvertError(
            f"{path}: no_scale_embedding: found false with tie_word_embeddings: true; GPT-NeoX "
            "scales no embeddings, and the scale cannot go into rows that the head shares"
        )
    return config


# ---- Writing

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
DTYPE_NAMES = dict(zip(DTYPES, ("F64", "F32", "F16", "BF16"), strict=True))
# Written data is flushed to the disk this often, while the next tensors are read. The system alone
# would wait until much of the memory holds unwritten data.
FLUSH_BYTES = 64 * 2**20
HASHED_BYTES = 2**20


def size_argument(text: str) -> int:
    """Argument type: a size such as `5GB`, `500MB` or `2GiB`, in bytes."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?)\s*([KMG]I?)?B?", text.strip().upper())
    size = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if size < 1:
        refuse(text, "a size such as 5GB")
    return size


def write_weights(
    folder: Path,
    table: Sequence[TensorRule],
    full: Callable[[TensorRule], torch.Tensor],
    dtypes: Mapping[TensorRule, torch.dtype],
    max_shard_bytes: int,
) -> tuple[int, dict[str, str]]:
    """Writes all tensors as safetensors files, with an index if there are several. Returns the
    bytes of data written, and the SHA-256 of the files by name.

    Args:
        folder: where to write.
        table: the model's tensors, with the vocabulary to write.
        full: returns a tensor over all ranks.
        dtypes: the dtype to write each tensor in.
        max_shard_bytes: largest size of a file's data. A larger tensor gets a file of its own.

    Raises:
        ConvertError: the disk has not enough room, or a value is not finite, or does not fit into
            the dtype.
    """
    planned = {
        piece.name: torch.empty(piece.shape, dtype=dtypes[rule], device="meta")
        for rule in table
        for piece in rule.pieces
    }
    split = split_torch_state_dict_into_shards(
        planned, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    total = split.metadata["total_size"]
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ConvertError(
            f"{folder.parent}: the tensors take {total / 1e6:,.1f} MB, but the disk has only "
            f"{free / 1e6:,.1f} MB free"
        )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)

    writers: dict[str, SafetensorsWriter] = {}
    checksums: dict[str, str] = {}
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="writing tensors") as bar:
            for rule in table:
                for name, piece in rule.to_hf(full(rule)).items():
                    file = split.tensor_to_filename[name]
                    if file not in writers:
                        tensors = {n: planned[n] for n in split.filename_to_tensors[file]}
                        writers[file] = SafetensorsWriter(folder / file, tensors)
                    check_finite(piece, name)
                    writers[file].write(name, _cast(piece, dtypes[rule], name))
                    if writers[file].is_complete:
                        checksums[file] = writers[file].close()
                    bar.update(planned[name].nbytes)
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    return total, checksums


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    cast = tensor.to(dtype)
    if dtype == torch.float16 and cast is not tensor:
        if not torch.equal(cast.isfinite(), tensor.isfinite()):
            largest = tensor.abs().max().item()
            raise ConvertError(f"{name}: {largest:.1e} is too large for float16; take bfloat16")
    return cast


class SafetensorsWriter:
    """A safetensors file that is written tensor by tensor, in the order of `tensors` on the meta
    device.

    The format (https://huggingface.co/docs/safetensors): length of the header as 8 bytes
    little-endian, JSON header, data. A thread hashes what was written, from the page cache, while
    the next tensor is read.
    """

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, tensor in tensors.items():
            end = offset + tensor.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the data
        self._waiting = list(tensors.items())[::-1]
        self._path = path
        self._file = path.open("wb", buffering=0)
        self._written, self._sum, self._hashed = 0, hashlib.sha256(), 0
        self._hasher = ThreadPoolExecutor(1)
        self._hashing: Future | None = None
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future | None = None
        self._unflushed = 0
        self._append(memoryview(len(text).to_bytes(8, "little") + text))

    @property
    def is_complete(self) -> bool:
        """Returns whether all announced tensors are written."""
        return not self._waiting

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Appends the next tensor. Raises a ValueError if it is not the one that was announced."""
        next_name, announced = self._waiting.pop()
        found, wanted = (tensor.dtype, tensor.shape), (announced.dtype, announced.shape)
        if name != next_name or found != wanted:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was not announced")
        self._append(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def _append(self, data: memoryview) -> None:
        """Appends bytes. Raises an OSError if the disk is full, or an earlier flush failed; names
        the file."""
        while data.nbytes:
            try:
                written = self._file.write(data)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._path.name) from None
            self._unflushed += written
            self._written += written
            data = data[written:]
        # The hash thread reads the file: by then the tensor's memory holds the next tensor.
        self._hashing = self._hasher.submit(self._hash_to, self._written)
        if self._unflushed >= FLUSH_BYTES and (not self._flushing or self._flushing.done()):
            if self._flushing:
                self._flushing.result()
            self._flushing = self._flusher.submit(os.fdatasync, self._file.fileno())
            self._unflushed = 0

    def _hash_to(self, end: int) -> None:
        with self._path.open("rb") as file:
            file.seek(self._hashed)
            while self._hashed < end:
                piece = file.read(min(HASHED_BYTES, end - self._hashed))
                if not piece:
                    raise OSError(errno.EIO, "became shorter while it was written", self._path.name)
                self._sum.update(piece)
                self._hashed += len(piece)

    def close(self) -> str:
        """Closes the file once it is on the disk, and returns its SHA-256. Raises a ValueError if
        an announced tensor was not written, and an OSError if the file could not be written to the
        disk."""
        try:
            if self._waiting:
                raise ValueError(f"{self._waiting[-1][0]} was announced and not written")
            if self._flushing:
                self._flushing.result()
            self._hashing.result()
            os.fsync(self._file.fileno())
            return self._sum.hexdigest()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Closes the file, complete or not."""
        self._hasher.shutdown()
        self._flusher.shutdown()
        self._file.close()


def write_config(
    folder: Path, shape: Architecture, special: Mapping[str, int | None], dtype: torch.dtype
) -> None:
    """Writes config.json, generation_config.json and the model's code, which loads the folder where
    this package is not installed. `special` is that of `RunTokenizer`, `dtype` that of most
    tensors. Raises a ConvertError if the Hugging Face model does not accept a value."""
    from transformers import GenerationConfig

    from megatron_patch.hf.remote_code import write_model_code

    kind = {"architectures": ["MetaLAForCausalLM"]}
    if shape.rewards:
        kind = {"architectures": ["MetaLAForSequenceClassification"], "num_labels": 1}
    # Where the tokenizer's own configuration names a class, that counts. But without this one,
    # transformers 4's `pipeline` loads no tokenizer for a model that it does not know itself.
    kind["tokenizer_class"] = "PreTrainedTokenizerFast"
    try:
        config = MetaLAConfig(**shape.to_hf(), **kind, **special)
    except ValueError as error:
        raise ConvertError(f"the settings cannot be exported: {error}") from None
    config.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    # transformers 4 reads torch_dtype, transformers 5 reads dtype.
    values["torch_dtype"] = values["dtype"] = str(dtype).removeprefix("torch.")
    write_json(path, dict(sorted(values.items())))
    if not shape.rewards:
        GenerationConfig(**special).save_pretrained(folder)
    write_model_code(folder)
