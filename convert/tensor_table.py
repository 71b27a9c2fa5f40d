"""The one table of a MetaLA model's tensors: name and shape in GPT-NeoX, how each is split over
tensor-parallel ranks, and what it is in Hugging Face.

Merging, splitting, exporting and importing all read this table, so they cannot disagree.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from convert.command import ConvertError
from convert.model_shape import ModelShape


class Split(enum.Enum):
    """How a tensor lies on the tensor-parallel ranks."""

    REPLICATED = "replicated"  # the same on every rank
    COLUMN = "column"  # rows of a column-parallel matrix: dim 0, each of its parts on its own
    ROW = "row"  # columns of a row-parallel matrix: dim 1
    VOCAB = "vocabulary"  # tokens: dim 0, padding rows at the end


@dataclass(frozen=True)
class Piece:
    """A Hugging Face tensor inside a GPT-NeoX one: `rows` consecutive rows of each group."""

    name: str
    rows: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorRule:
    """One tensor of the model.

    Attributes:
        layer: index of GPT-NeoX's layer, as in `layer_{index}-…` and `sequential.{index}.…`.
        name: the tensor's name inside that layer.
        shape: its full shape, over all ranks.
        split: how it is divided.
        parts: for COLUMN, matrices stacked along dim 0, of which each rank has its share of each.
        groups: dim 0 is this many groups of equal size; each holds the rows of all `pieces`.
        pieces: the Hugging Face tensors, in their order inside a group.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    split: Split
    pieces: tuple[Piece, ...]
    parts: int = 1
    groups: int = 1

    def shard_shape(self, degree: int) -> tuple[int, ...]:
        """Shape on one of `degree` ranks."""
        shape = list(self.shape)
        if self.split is not Split.REPLICATED:
            shape[1 if self.split is Split.ROW else 0] //= degree
        return tuple(shape)

    def merge(
        self,
        shards: Sequence[torch.Tensor],
        files: Sequence[object],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The full tensor from those of all ranks, in rank order.

        Args:
            shards: the ranks' tensors.
            files: each rank's file, for the error.
            out: uint8, memory for the result, which is then valid until `out` is used again. New
                memory costs more time than the merging.

        Raises:
            ConvertError: replicated copies differ in any bit; the line names tensor, ranks and
                files.
        """
        if self.split is Split.REPLICATED:
            for rank, copy in enumerate(shards):
                if not torch.equal(_bits(copy), _bits(shards[0])):
                    difference = (copy.double() - shards[0].double()).abs().max().item()
                    raise ConvertError(
                        f"layer {self.layer}: {self.name} must be the same on all tensor-parallel "
                        f"ranks, but ranks 0 and {rank} differ by up to {difference:.1e} "
                        f"({files[0]}, {files[rank]})"
                    )
            return shards[0]
        if len(shards) == 1:
            return shards[0]
        is_row = self.split is Split.ROW
        parts = [s if is_row else s.unflatten(0, (self.parts, -1)) for s in shards]
        if out is not None:
            shape = (parts[0].shape[0], sum(p.shape[1] for p in parts), *parts[0].shape[2:])
            out = out[: sum(s.nbytes for s in shards)].view(shards[0].dtype).view(shape)
        full = torch.cat(parts, dim=1, out=out)
        return full if is_row else full.flatten(0, 1)

    def shard(self, full: torch.Tensor, degree: int, rank: int) -> torch.Tensor:
        """What `rank` of `degree` holds of the full tensor; may be a view of it."""
        if self.split is Split.REPLICATED:
            return full
        if self.split is Split.ROW:
            return full.chunk(degree, dim=1)[rank]
        return full.unflatten(0, (self.parts, -1)).chunk(degree, dim=1)[rank].flatten(0, 1)

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """The Hugging Face tensors by name, views of `full` where possible."""
        grouped = full.unflatten(0, (self.groups, -1))
        parts = grouped.split([piece.rows for piece in self.pieces], dim=1)
        return {
            piece.name: part.reshape(piece.shape)
            for piece, part in zip(self.pieces, parts, strict=True)
        }

    def from_hf(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The full tensor from its Hugging Face pieces: the inverse of `to_hf`."""
        parts = [
            tensors[piece.name].reshape(self.groups, piece.rows, *self.shape[1:])
            for piece in self.pieces
        ]
        return torch.cat(parts, dim=1).reshape(self.shape)


def embedding_layer() -> int:
    """Index of the embedding among GPT-NeoX's layers."""
    return 0


def block_layer(block: int) -> int:
    """Index of a block; layer 1 is a function that transposes, without tensors."""
    return block + 2


def norm_layer(shape: ModelShape) -> int:
    """Index of the last norm, which follows another function without tensors."""
    return shape.num_layers + 3


def head_layer(shape: ModelShape) -> int:
    """Index of the output layer; tied weights leave it without tensors of its own."""
    return shape.num_layers + 4


def module_layers(shape: ModelShape) -> list[int]:
    """Indices of the layers that are modules: each has a file in a pipeline-form checkpoint, be it
    empty."""
    blocks = [block_layer(i) for i in range(shape.num_layers)]
    head = [] if shape.tied else [head_layer(shape)]
    return [embedding_layer(), *blocks, norm_layer(shape), *head]


def tensor_table(shape: ModelShape) -> list[TensorRule]:
    """All tensors of a model, layer by layer."""
    d, f = shape.hidden_size, shape.intermediate_size
    heads, key, value = shape.num_heads, shape.key_width, shape.value_width
    vocabulary = shape.padded_vocab_size
    rules: list[TensorRule] = []

    def add(layer: int, name: str, size: tuple[int, ...], split: Split, *hf: Piece, **options):
        rules.append(TensorRule(layer, name, size, split, hf, **options))

    def whole(name: str, size: tuple[int, ...], flat: bool = False) -> Piece:
        return Piece(name, size[0], (math.prod(size),) if flat else size)

    def norm(layer: int, name: str, hf_name: str) -> None:
        if shape.norm == "rmsnorm":
            add(layer, name, (d,), Split.REPLICATED, whole(hf_name, (d,)))

    def plain(layer: int, name: str, size: tuple[int, ...], split: Split, hf: str, **hf_options):
        add(layer, name, size, split, whole(hf, size, **hf_options))

    embedding = (vocabulary, d)
    plain(0, "word_embeddings.weight", embedding, Split.VOCAB, "model.embed_tokens.weight")
    for i in range(shape.num_layers):
        layer = block_layer(i)
        mixer = f"model.layers.{i}.token_mixer"
        mlp = f"model.layers.{i}.channel_mixer"
        norm(layer, "input_norm.scale", f"model.layers.{i}.token_norm.weight")
        conv = (d, 1, shape.conv_width)
        plain(layer, "mixer.conv1d.weight", conv, Split.REPLICATED, f"{mixer}.conv1d.weight")
        add(
            layer,
            "mixer.in_proj.weight",
            (3 * d, d),
            Split.COLUMN,
            Piece(f"{mixer}.q_proj.weight", key, (d // 2, d)),
            Piece(f"{mixer}.k_gate.weight", key, (d // 2, d)),
            Piece(f"{mixer}.v_proj.weight", value, (d, d)),
            Piece(f"{mixer}.g_proj.weight", value, (d, d)),
            groups=heads,
        )
        bias, aug = (heads, value), (heads, key)
        plain(layer, "mixer.out_gate_bias", bias, Split.COLUMN, f"{mixer}.g_proj.bias", flat=True)
        if shape.self_augmentation:
            plain(layer, "mixer.aug_balance", aug, Split.COLUMN, f"{mixer}.aug_balance", flat=True)
        plain(layer, "mixer.out_proj.weight", (d, d), Split.ROW, f"{mixer}.out_proj.weight")
        norm(layer, "mlp_norm.scale", f"model.layers.{i}.channel_norm.weight")
        add(
            layer,
            "mlp.gate_up_proj.weight",
            (2 * f, d),
            Split.COLUMN,
            Piece(f"{mlp}.l1.weight", f, (f, d)),
            Piece(f"{mlp}.l2.weight", f, (f, d)),
            parts=2,
        )
        plain(layer, "mlp.down_proj.weight", (d, f), Split.ROW, f"{mlp}.l3.weight")
    norm(norm_layer(shape), "norm.scale", "model.final_norm.weight")
    if not shape.tied:
        head = head_layer(shape)
        plain(head, "final_linear.weight", embedding, Split.VOCAB, "lm_head.weight")
    return rules


def fit_vocabulary(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """A vocabulary tensor cut to `rows`, or filled up to them with zeros."""
    if rows <= tensor.shape[0]:
        return tensor[:rows]
    padding = tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])
    return torch.cat([tensor, padding])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Equal tensors have equal bytes, also where they hold NaN."""
    return tensor.contiguous().view(torch.uint8)
