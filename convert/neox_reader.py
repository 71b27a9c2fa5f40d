"""Reading GPT-NeoX checkpoints.

A checkpoint folder holds a folder `global_stepN` for each iteration, with one of three sets of
files:

    layer files (pipe_parallel_size >= 1): layer_{layer:02d}-model_{rank:02d}-model_states.pt, the
        tensors of one layer on one tensor-parallel rank
    mp_rank files (pipe_parallel_size 0): mp_rank_{rank:02d}_model_states.pt, whose "module" holds
        all layers of one rank, as `sequential.{layer}.{tensor}`
    ZeRO stage 3 files: see `convert.zero3`; the names are those of mp_rank files

`global_stepN/configs` holds the YAML files of the run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from convert.command import ConvertError
from convert.files import (
    check_bytes,
    check_regular,
    load_torch_file,
    plain_tensors,
    read_text,
    refusing,
    saved_name,
)
from convert.tensor_table import Split, TensorRule, fit_vocabulary, tensor_table
from convert.zero3 import MAPPED_BYTES, Zero3Checkpoint
from convert.zero3 import MODEL_FILE as ZERO3_FILE
from megatron_patch.architecture import WHOLE, Architecture, shown
from megatron_patch.architecture_neox import (
    from_neox,
    module_layers,
    why_not_exportable,
    with_defaults,
)
from megatron_patch.neox.yaml_config import SUFFIXES, merge_yaml, merge_yaml_texts
from megatron_patch.steps import STEP, latest_step, saved_steps

LAYER_FILE_NAME = "layer_{:02d}-model_{:02d}-model_states.pt"
RANK_FILE_NAME = "mp_rank_{:02d}_model_states.pt"
LAYER_FILE = re.compile(r"layer_([0-9]+)-model_([0-9]+)-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_([0-9]+)_model_states\.pt")
MODULE_NAME = re.compile(r"sequential\.([0-9]{1,9})\.(.+)")


def layer_and_rank(name: str) -> tuple[int, ...] | None:
    """Returns (layer, rank) from the name of a layer file, (rank,) from that of an mp_rank file,
    and `None` for other names."""
    found = LAYER_FILE.fullmatch(name) or RANK_FILE.fullmatch(name)
    return tuple(map(int, found.groups())) if found else None


def find_step(checkpoint: Path, iteration: int | None) -> Path:
    """Returns the `global_stepN` folder of an iteration, by default of the one in `latest`. Raises
    a ConvertError if there is none; the line lists those present."""
    with refusing(checkpoint):
        if not checkpoint.is_dir():
            raise ConvertError(f"{checkpoint} is no checkpoint: no such folder")
    try:
        steps = saved_steps(checkpoint)
    except ValueError as error:
        raise ConvertError(str(error)) from None
    present = f"it holds iterations {', '.join(map(str, steps))}"
    if not steps:
        step = STEP.fullmatch(checkpoint.absolute().name)
        hint = f"; wanted the folder above it, and --iteration {step[1]}" if step else ""
        raise ConvertError(f"{checkpoint} is no checkpoint: it holds no global_stepN folder{hint}")
    if iteration is not None:
        if iteration not in steps:
            raise ConvertError(f"{checkpoint} has no iteration {iteration}; {present}")
        return checkpoint / f"global_step{iteration}"
    latest = checkpoint / "latest"
    if os.path.lexists(latest):
        check_regular(latest, checkpoint)
    try:
        return latest_step(checkpoint)
    except ValueError as error:
        raise ConvertError(f"{error}; choose by --iteration: {present}") from None


def read_settings(step: Path, config: Sequence[Path] | None) -> dict[str, Any]:
    """Returns the run's merged settings, from the files `config` or else the checkpoint's own.
    Raises a ConvertError if the checkpoint has none, and a SettingsError if a file cannot be read,
    or a key is given twice."""
    if config:
        return merge_yaml(config)
    texts = config_texts(step)
    if not texts:
        raise ConvertError(f"{step} has no configs/*.yml; give the run's by --config")
    return merge_yaml_texts(texts, in_order=False)


def config_texts(step: Path) -> dict[str, str]:
    """Returns the YAML texts inside a checkpoint by file name. A link out of the checkpoint is
    refused, because these texts are copied into the folders that the commands write."""
    folder = step / "configs"
    with refusing(folder):
        files = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in files if path.suffix in SUFFIXES]
    for path in files:
        if not path.name.isprintable():
            raise ConvertError(f"{path}: found a name that no terminal shows, wanted another")
    return {path.name: read_text(path, step.parent) for path in files}


def described_model(
    settings: Mapping[str, Any], padded_vocab_size: int | None = None
) -> Architecture:
    """Returns the model that a run's merged settings describe, with `padded_vocab_size` rows over
    all tensor-parallel ranks. Raises a ConvertError if it cannot be exported, which says why, and a
    SettingsError if the settings are malformed."""
    args = with_defaults(settings)
    model = from_neox(args, padded_vocab_size)
    for name, found, wanted in why_not_exportable(args):
        raise ConvertError(f"{name}: found {found}, which cannot be exported, wanted {wanted}")
    return model


def check_tensor_parallel(shape: Architecture, degree: int) -> None:
    """Raises a ConvertError if the model cannot be split over `degree` ranks."""
    sizes = [
        ("num_attention_heads", shape.num_heads),
        ("intermediate_size", shape.intermediate_size),
        ("the padded vocabulary", shape.padded_vocab_size),
    ]
    if shape.attention:
        sizes.append(("num_kv_heads", shape.attention.num_kv_heads))
        sizes.append(("the MLP of attention layers", shape.attention.intermediate_size))
    for name, size in sizes:
        if size % degree:
            raise ConvertError(f"tensor parallel {degree} does not divide {name}, {size}")


class NeoXCheckpoint:
    """One iteration of a checkpoint, checked for completeness when it is opened.

    Attributes:
        step: the `global_stepN` folder.
        iteration: N.
        settings: the run's merged YAML settings.
        tensor_parallel: number of ranks that a tensor is split over.
        form: which files it has: `layer-file`, `mp_rank` or `ZeRO 3`.
        shape, table: the model's shape, and the rules of all its tensors.
        samples: sequences trained on until this iteration, `None` if not recorded.

    Raises:
        ConvertError: a file is missing, damaged or of another model, or the model cannot be
            exported.
        SettingsError: the settings are malformed.
    """

    def __init__(
        self, checkpoint: Path, iteration: int | None = None, config: Sequence[Path] | None = None
    ):
        self.step = find_step(checkpoint, iteration)
        self.iteration = int(STEP.fullmatch(self.step.name)[1])
        self.settings = read_settings(self.step, config)
        self.tensor_parallel = with_defaults(self.settings).model_parallel_size
        self._zero3: Zero3Checkpoint | None = None
        layer_files, rank_files = self._find_files()
        self._layers: dict[int, list[Mapping[str, torch.Tensor]]] = {}  # open ones, by rank
        self._starts: list[int] = []  # where each open file begins in memory
        self._compared: set[tuple[Path, int]] = set()  # records compared with their CRC-32
        self._bytes_read = 0
        # The tensors of each rank by layer and name, on the meta device.
        self._held: list[dict[int, dict[str, torch.Tensor]]] = [
            {} for _ in range(self.tensor_parallel)
        ]
        for layer, rank in sorted(layer_files) or [(0, r) for r in range(self.tensor_parallel)]:
            for index, tensors in self._read(layer, rank).items():
                self._held[rank][index] = {name: t.to("meta") for name, t in tensors.items()}
        rows = self._held[0].get(0, {}).get("word_embeddings.weight")
        if rows is None:
            what = "word_embeddings.weight" if self.file(0, 0).is_file() else "the file"
            raise ConvertError(f"{self.file(0, 0)}: {what} is missing")
        self.shape = described_model(self.settings, rows.shape[0] * self.tensor_parallel)
        check_tensor_parallel(self.shape, self.tensor_parallel)
        self.table = tensor_table(self.shape)
        self._check_layers()
        self._check_tensors()
        self.samples: int | None = None
        self._check_states(
            self._zero3.model_files
            if self._zero3
            else [self.step / rank_files[rank] for rank in sorted(rank_files)]
        )

    @property
    def has_layer_files(self) -> bool:
        """Returns whether each layer has files of its own, as with a pipeline."""
        return self.form == "layer-file"

    def file(self, layer: int, rank: int) -> Path:
        """Returns the file that holds a layer's tensors on a rank."""
        if self.has_layer_files:
            return self.step / LAYER_FILE_NAME.format(layer, rank)
        if self._zero3:
            return self._zero3.model_files[0]
        return self.step / RANK_FILE_NAME.format(rank)

    def shards(self, rule: TensorRule) -> list[torch.Tensor]:
        """Returns a tensor's shards in rank order, memory-mapped, after comparing each with its
        CRC-32. Raises a ConvertError if a file is damaged."""
        if self._zero3:
            return [self._zero3.read(f"sequential.{rule.layer}.{rule.name}")]
        if rule.layer not in self._layers or self._bytes_read > MAPPED_BYTES:
            self._layers, self._bytes_read = {}, 0
            files = [self._read(rule.layer, rank) for rank in range(self.tensor_parallel)]
            self._layers = {layer: [file[layer] for file in files] for layer in files[0]}
            self._starts = [
                min((_address(t) for tensors in file.values() for t in tensors.values()), default=0)
                for file in files
            ]
        shards = [tensors[rule.name] for tensors in self._layers[rule.layer]]
        for rank, (shard, start) in enumerate(zip(shards, self._starts, strict=True)):
            file = self.file(rule.layer, rank)
            record = (file, _address(shard) - start)  # views of one ZeRO buffer share a record
            if record not in self._compared:
                check_bytes(file, f"layer {rule.layer}: {rule.name}", shard)
                self._compared.add(record)
        self._bytes_read += sum(shard.nbytes for shard in shards)
        return shards

    def full(self, rule: TensorRule, out: torch.Tensor | None = None) -> torch.Tensor:
        """Returns a tensor over all ranks. The rule may be of a table with another vocabulary size,
        to which the tensor is then cut or padded; `out` is memory for `TensorRule.merge`. Raises a
        ConvertError if replicated copies differ, or a file is damaged."""
        files = [self.file(rule.layer, rank) for rank in range(self.tensor_parallel)]
        tensor = rule.merge(self.shards(rule), files, out)
        return fit_vocabulary(tensor, rule.shape[0]) if rule.split is Split.VOCAB else tensor

    def dtype(self, rule: TensorRule) -> torch.dtype:
        """Returns a tensor's dtype, the same on all ranks."""
        return self._held[0][rule.layer][rule.name].dtype

    def _find_files(self) -> tuple[dict[tuple[int, ...], str], dict[int, str]]:
        """Sets `form`, opens ZeRO stage 3 files, and checks names against the settings. Returns the
        names of layer files by (layer, rank), and of mp_rank files by rank."""
        with refusing(self.step):
            names = [path.name for path in self.step.iterdir()]
        found = {key: name for name in names if (key := layer_and_rank(name))}
        layer_files = {key: name for key, name in found.items() if len(key) == 2}
        rank_files = {key[0]: name for key, name in found.items() if len(key) == 1}
        is_zero3 = any(ZERO3_FILE.fullmatch(name) for name in names)
        if not (found or is_zero3):
            raise ConvertError(
                f"{self.step} is no checkpoint: it holds neither layer_*-model_*-model_states.pt "
                "nor mp_rank_*_model_states.pt nor zero_pp_rank_*_mp_rank_00_model_states.pt"
            )
        if is_zero3 and found:
            raise ConvertError(
                f"{self.step}: {min(found.values())} lies beside files of ZeRO stage 3: two "
                "layouts are mixed here"
            )
        self.form = "layer-file" if layer_files else "ZeRO 3" if is_zero3 else "mp_rank"
        if layer_files and not with_defaults(self.settings).pipe_parallel_size:
            raise ConvertError(
                f"{self.step / min(layer_files.values())}: a file of a pipeline, but the settings "
                "say pipe_parallel_size: 0; two layouts are mixed here, or --config is another's"
            )
        described_model(self.settings)  # wrong settings would make the names below misleading
        if is_zero3:
            if self.tensor_parallel != 1:
                raise ConvertError(
                    f"{self.step}: files of ZeRO stage 3, but model_parallel_size is "
                    f"{self.tensor_parallel}"
                )
            self._zero3 = Zero3Checkpoint(self.step)
        else:
            self._check_ranks({rank for _, rank in layer_files} if layer_files else set(rank_files))
        self._check_names(found.values())
        return layer_files, rank_files

    def _check_ranks(self, found: set[int]) -> None:
        for rank in range(self.tensor_parallel):
            if rank not in found:
                raise ConvertError(
                    f"{self.file(0, rank)}: the file is missing; model_parallel_size is "
                    f"{self.tensor_parallel}"
                )
        for rank in sorted(found):
            if rank >= self.tensor_parallel:
                raise ConvertError(
                    f"{self.file(0, rank)}: a file of rank {rank}, but model_parallel_size is "
                    f"{self.tensor_parallel}"
                )

    def _check_names(self, names: Iterable[str]) -> None:
        """Finds files that were exchanged or copied over one another. Their tensors do not tell
        layer and rank, but the name that `torch.save` stored inside them does."""
        for name in sorted(names):
            saved = saved_name(self.step / name, self.step.parent)
            if saved and layer_and_rank(saved) not in (None, layer_and_rank(name)):
                raise ConvertError(
                    f"{self.step / name}: the file was saved as {saved}: it was renamed, or "
                    "another's content was put in its place"
                )

    def _read(self, layer: int, rank: int) -> dict[int, dict[str, torch.Tensor]]:
        """Returns the tensors of the file that holds a layer, by layer and name: of all layers but
        in layer files, and on the meta device under ZeRO stage 3."""
        path = self.file(layer, rank)
        if self._zero3:
            return self._by_layer({"module": self._zero3.tensors()}, path)
        content = load_torch_file(path, self.step.parent)
        layers = {layer: content} if self.has_layer_files else self._by_layer(content, path)
        return {index: plain_tensors(tensors, path) for index, tensors in layers.items()}

    @staticmethod
    def _by_layer(states: Mapping[str, Any], path: Path) -> dict[int, dict[str, Any]]:
        module = states.get("module")
        if not isinstance(module, Mapping):
            raise ConvertError(
                f"{path}: no tensors under 'module': the layer_*-model_*-model_states.pt files of "
                "a pipeline belong beside it, and are missing"
            )
        layers: dict[int, dict[str, Any]] = {}
        for name, tensor in module.items():
            found = MODULE_NAME.fullmatch(name) if isinstance(name, str) else None
            if not found:
                raise ConvertError(f"{path}: {shown(name)} is no tensor of a MetaLA model")
            layers.setdefault(int(found[1]), {})[found[2]] = tensor
        return layers

    def _check_layers(self) -> None:
        """Checks that the model's layers are there, and no others."""
        wanted = module_layers(self.shape.num_layers, self.shape.tied)
        described = f"num_layers is {self.shape.num_layers}"
        for rank, held in enumerate(self._held):
            for layer in wanted:
                if self.has_layer_files and layer not in held:
                    raise ConvertError(
                        f"{self.file(layer, rank)}: the file is missing; {described}"
                    )
            for layer in sorted(held.keys() - set(wanted)):
                raise ConvertError(
                    f"{self.file(layer, rank)}: layer {layer} is no layer of this model; "
                    f"{described}, weights are {'tied' if self.shape.tied else 'not tied'}"
                )

    def _check_tensors(self) -> None:
        """Checks that every file holds the table's tensors, in its shapes, and no others."""
        for layer in module_layers(self.shape.num_layers, self.shape.tied):
            rules = {rule.name: rule for rule in self.table if rule.layer == layer}
            for rank, held in enumerate(self._held):
                tensors = held.get(layer, {})
                where = f"{self.file(layer, rank)}: layer {layer}"
                for name in tensors:
                    if name not in rules:
                        raise ConvertError(f"{where}: {name} is no tensor of this model")
                for name, rule in rules.items():
                    if name not in tensors:
                        raise ConvertError(f"{where}: {name} is missing")
                    found = tuple(tensors[name].shape)
                    wanted = rule.shard_shape(self.tensor_parallel)
                    if found != wanted:
                        raise ConvertError(f"{where}: {name} has shape {found}, wanted {wanted}")
                    if tensors[name].dtype != self.dtype(rule):
                        raise ConvertError(
                            f"{where}: {name} is {tensors[name].dtype}, on rank 0 it is "
                            f"{self.dtype(rule)}"
                        )

    def _check_states(self, files: Sequence[Path]) -> None:
        """Checks the iteration and the sizes that the files store, and sets `samples`."""
        for file in files:
            states = load_torch_file(file, self.step.parent)
            found = states.get("iteration", self.iteration)
            if not _is_equal(found, self.iteration):
                raise ConvertError(
                    f"{file}: a file of iteration {shown(found)} in the folder of {self.iteration}"
                )
            if self.has_layer_files and states.get("module") is not None:
                raise ConvertError(
                    f"{file}: a whole model among the files of a pipeline; two layouts "
                    "are mixed here"
                )
            self.samples = self._samples(states)
            saved = states.get("args")
            for key in ("num_layers", "hidden_size", "num_attention_heads", "model_parallel_size"):
                if not isinstance(saved, Mapping) or key not in saved or key not in self.settings:
                    continue
                if not _is_equal(saved[key], self.settings[key]):
                    raise ConvertError(
                        f"{file}: saved with {key} {shown(saved[key])}, but the settings say "
                        f"{self.settings[key]}"
                    )

    def _samples(self, states: Mapping[str, Any]) -> int | None:
        """Returns DeepSpeed's count of samples, or without one iterations times batch size."""
        counted = states.get("global_samples")
        if counted is not None:
            return counted if WHOLE.accepts(counted) else None
        batch = self.settings.get("train_batch_size")
        return self.iteration * batch if WHOLE.accepts(batch) else None


def _address(tensor: torch.Tensor) -> int:
    """Returns the address of the record that a mapped tensor lies in."""
    return tensor.untyped_storage().data_ptr()


def _is_equal(found: object, number: int) -> bool:
    """Compares a value of unknown type, which may be a tensor, with a number."""
    return isinstance(found, int) and found == number
