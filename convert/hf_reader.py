"""Reading Hugging Face folders of MetaLA models, the authors' or ours, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from convert.command import ConvertError
from convert.export_record import check_record
from convert.inputs import check_regular, read_json
from convert.tensor_table import Split, TensorRule, fit_vocabulary, tensor_table
from convert.torch_file import DTYPES, check_bytes, load_torch_file, plain_tensors
from megatron_patch.architecture import Architecture, shown
from megatron_patch.hf import MetaLAConfig

# Where transformers saves weights, the first that is there is read.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class HFFolder:
    """A model's configuration and weights, checked for completeness when it is opened.

    One weight file at a time is open, mapped and not read.

    Attributes:
        folder: where it is.
        config: the configuration.
        shape: the model's shape, its vocabulary without padding.
        dtypes: of each tensor of the model, by name.

    Raises:
        ConvertError: a file is missing or damaged, a value of config.json cannot be had in
            GPT-NeoX, or a tensor is missing, unexpected or of another shape.
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
        # GPT-NeoX does not scale embeddings.
        self._embed_scale = 1.0 if self.config.no_scale_embedding else self.shape.hidden_size**0.5

    def full(self, rule: TensorRule) -> torch.Tensor:
        """A tensor over all ranks.

        Args:
            rule: of this model's table, or of one with a padded vocabulary, whose rows behind the
                model's own are zeros.
        """
        tensors = {piece.name: self._tensor(piece.name) for piece in rule.pieces}
        if rule.split is not Split.VOCAB:
            return rule.from_hf(tensors)
        ((name, tensor),) = tensors.items()
        if name == EMBEDDING and self._embed_scale != 1.0:
            tensor = tensor * self._embed_scale  # rounded as the model rounds each product
        return fit_vocabulary(tensor, rule.shape[0])

    def _find_tensors(self) -> dict[str, Path]:
        """The file of each tensor."""
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
        if self.shape.num_layers > len(self._files):
            raise ConvertError(
                f"{self.folder}: config.json has decoder_layers {self.shape.num_layers}, but there "
                f"are {len(self._files)} tensors alone"
            )
        wanted = {
            piece.name: piece.shape for rule in tensor_table(self.shape) for piece in rule.pieces
        }
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
        for rule in tensor_table(self.shape):
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
        if self._opened is None or self._opened[0] != path:
            self._opened = None  # closed before the next is opened
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
    """The configuration, if GPT-NeoX can have such a model."""
    path = folder / "config.json"
    values = read_json(path, folder)
    kind = values.get("model_type")
    if kind != "metala":
        raise ConvertError(f"{path}: model_type: found {shown(kind)}, wanted metala")
    try:
        config = MetaLAConfig(**values)
    except Exception as error:  # transformers checks types in ways of its own
        raise ConvertError(f"{path}: {' '.join(str(error).split())}") from None
    if config.bias:
        raise ConvertError(f"{path}: bias: found true, wanted false: the MLP has none in GPT-NeoX")
    if config.tie_word_embeddings and not config.no_scale_embedding:
        raise ConvertError(
            f"{path}: no_scale_embedding: found false with tie_word_embeddings: true; GPT-NeoX "
            "scales no embeddings, and the scale cannot go into rows that the head shares"
        )
    return config
