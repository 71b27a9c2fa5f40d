"""Writing a model as a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from convert.command import ConvertError
from convert.json_file import write_json
from convert.safetensors_writer import SafetensorsWriter, nbytes
from convert.tensor_table import TensorRule, check_finite
from convert.tokenizer_folder import SpecialTokens
from megatron_patch.architecture import Architecture

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Bytes from `5GB`, `500MB`, `2GiB`.

    Raises:
        ValueError: it is no size, or none that a file can have.
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?)\s*([KMG]I?)?B?", text.strip().upper())
    size = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size such as 5GB")
    return size


def write_weights(
    folder: Path,
    table: Sequence[TensorRule],
    full: Callable[[TensorRule], torch.Tensor],
    dtypes: Mapping[TensorRule, torch.dtype],
    max_shard_bytes: int,
) -> tuple[int, dict[str, str]]:
    """Writes all tensors as safetensors, in files of at most `max_shard_bytes` (a larger tensor has
    a file of its own), with an index if there are several.

    Args:
        folder: where to.
        table: the model's tensors, its vocabulary of the size to write.
        full: gives a tensor over all ranks.
        dtypes: the dtype to write each in.
        max_shard_bytes: size of a file's data.

    Returns:
        bytes of data written, and SHA-256 of the files by name.

    Raises:
        ConvertError: the disk has not enough room, or a value is not finite, or does not fit into
            the dtype.
    """
    planned: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for rule in table:
        for piece in rule.pieces:
            planned[piece.name] = (dtypes[rule], piece.shape)
    files: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in planned.items():
        if files[-1] and filled + nbytes(dtype, shape) > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += nbytes(dtype, shape)
    file_names = (
        ["model.safetensors"]
        if len(files) == 1
        else [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    )
    file_of = {name: file for names, file in zip(files, file_names, strict=True) for name in names}
    total = sum(nbytes(*planned[name]) for name in planned)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ConvertError(
            f"{folder.parent}: the tensors take {total / 1e6:,.1f} MB, but the disk has only "
            f"{free / 1e6:,.1f} MB free"
        )
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        write_json(folder / "model.safetensors.index.json", index)

    writer, open_file = None, None
    checksums: dict[str, str] = {}
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="writing tensors") as bar:
            for rule in table:
                for name, piece in rule.to_hf(full(rule)).items():
                    if file_of[name] != open_file:
                        if writer:
                            writer.close()
                            checksums[open_file] = writer.checksum
                        open_file = file_of[name]
                        announced = {n: planned[n] for n in planned if file_of[n] == open_file}
                        writer = SafetensorsWriter(folder / open_file, announced)
                    check_finite(piece, name)
                    writer.write(name, _cast(piece, dtypes[rule], name))
                    bar.update(nbytes(*planned[name]))
    except BaseException:
        if writer:
            writer.abandon()
        raise
    writer.close()
    checksums[open_file] = writer.checksum
    return total, checksums


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    cast = tensor.to(dtype)
    if dtype == torch.float16 and cast is not tensor:
        if not torch.equal(cast.isfinite(), tensor.isfinite()):
            largest = tensor.abs().max().item()
            raise ConvertError(f"{name}: {largest:.1e} is too large for float16; take bfloat16")
    return cast


def write_config(
    folder: Path,
    shape: Architecture,
    special: SpecialTokens,
    dtype: torch.dtype,
) -> None:
    """Writes config.json, generation_config.json, and the model's code, with which the folder loads
    where this package is not installed.

    Args:
        folder: where to.
        shape: the model's shape as written.
        special: ids of the special tokens.
        dtype: what most tensors were written in.

    Raises:
        ConvertError: the Hugging Face model cannot have a value.
    """
    from transformers import GenerationConfig

    from megatron_patch.hf import MetaLAConfig
    from megatron_patch.hf.remote_code import write_model_code

    tokens = {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
    }
    try:
        config = MetaLAConfig(**shape.to_hf(), architectures=["MetaLAForCausalLM"], **tokens)
    except ValueError as error:
        raise ConvertError(f"the settings cannot be exported: {error}") from None
    config.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    # transformers 4 reads the first name, 5 the second.
    values["torch_dtype"] = values["dtype"] = str(dtype).removeprefix("torch.")
    write_json(path, dict(sorted(values.items())))
    GenerationConfig(**tokens).save_pretrained(folder)
    write_model_code(folder)
