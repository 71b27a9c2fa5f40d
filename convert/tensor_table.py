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
from megatron_patch.architecture import Architecture, AttentionLayers

# The tensors of a norm, by GPT-NeoX's names, and what each is in Hugging Face.
NORM_TENSORS: dict[str, dict[str, str]] = {
    "simplermsnorm": {},
    "rmsnorm": {"scale": "weight"},
    "layernorm": {"weight": "weight", "bias": "bias"},
}


class Split(enum.Enum):
    """How a tensor lies on the tensor-parallel ranks."""

    REPLICATED = "replicated"  # the same on every rank
    COLUMN = "column"  # rows of a column-parallel matrix: dim 0, see `TensorRule.groups`
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
        pieces: the Hugging Face tensors, in their order inside a group.
        groups: dim 0 is this many groups of equal size, heads say, each of which holds rows of all
            `pieces`; a rank of a COLUMN split has whole groups. Where there is but one, the pieces
            lie one after another, and each rank has its share of each.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    split: Split
    pieces: tuple[Piece, ...]
    groups: int = 1

    @property
    def _dim(self) -> int:
        """The dimension that is split."""
        return 1 if self.split is Split.ROW else 0

    @property
    def _is_stacked(self) -> bool:
        """Whether each rank has its share of every piece, one after another."""
        return self.split is Split.COLUMN and self.groups == 1 and len(self.pieces) > 1

    def shard_shape(self, degree: int) -> tuple[int, ...]:
        """Shape on one of `degree` ranks."""
        shape = list(self.shape)
        if self.split is not Split.REPLICATED:
            shape[self._dim] //= degree
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
        if self._is_stacked:
            rows = [piece.rows // len(shards) for piece in self.pieces]
            by_rank = [shard.split(rows) for shard in shards]
            parts = [share for piece in zip(*by_rank, strict=True) for share in piece]
        else:
            parts = list(shards)
        if out is not None:
            shape = list(parts[0].shape)
            shape[self._dim] = sum(part.shape[self._dim] for part in parts)
            size = sum(part.nbytes for part in parts)
            out = out[:size].view(parts[0].dtype).view(shape)
        return torch.cat(parts, dim=self._dim, out=out)

    def shard(self, full: torch.Tensor, degree: int, rank: int) -> torch.Tensor:
        """What `rank` of `degree` holds of the full tensor; may be a view of it."""
        if self.split is Split.REPLICATED:
            return full
        if not self._is_stacked:
            return full.chunk(degree, dim=self._dim)[rank]
        pieces = full.split([piece.rows for piece in self.pieces])
        return torch.cat([piece.chunk(degree)[rank] for piece in pieces])

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


def norm_layer(shape: Architecture) -> int:
    """Index of the last norm, which follows another function without tensors."""
    return shape.num_layers + 3


def head_layer(shape: Architecture) -> int:
    """Index of the output layer; tied weights leave it without tensors of its own."""
    return shape.num_layers + 4


def module_layers(shape: Architecture) -> list[int]:
    """Indices of the layers that are modules: each has a file in a pipeline-form checkpoint, be it
    empty."""
    blocks = [block_layer(i) for i in range(shape.num_layers)]
    head = [] if shape.tied else [head_layer(shape)]
    return [embedding_layer(), *blocks, norm_layer(shape), *head]


def tensor_table(shape: Architecture) -> list[TensorRule]:
    """All tensors of a model, layer by layer."""
    d, vocabulary = shape.hidden_size, shape.padded_vocab_size
    heads, key, value = shape.num_heads, shape.key_width, shape.value_width
    rules: list[TensorRule] = []

    def add(layer: int, name: str, size: tuple[int, ...], split: Split, *hf: Piece, **options):
        rules.append(TensorRule(layer, name, size, split, hf, **options))

    def whole(name: str, size: tuple[int, ...], flat: bool = False) -> Piece:
        return Piece(name, size[0], (math.prod(size),) if flat else size)

    def plain(layer: int, name: str, size: tuple[int, ...], split: Split, hf: str, **hf_options):
        add(layer, name, size, split, whole(hf, size, **hf_options))

    def norm(layer: int, name: str, hf: str) -> None:
        for neox, kind in NORM_TENSORS[shape.norm].items():
            plain(layer, f"{name}.{neox}", (d,), Split.REPLICATED, f"{hf}.{kind}")

    def column(layer: int, name: str, hf: dict[str, int], groups: int = 1, bias: bool = False):
        """A column-parallel matrix, of Hugging Face matrices by name and rows; and its bias."""
        for kind, columns in [("weight", (d,)), ("bias", ())][: 1 + bias]:
            pieces = [
                Piece(f"{n}.{kind}", rows // groups, (rows, *columns)) for n, rows in hf.items()
            ]
            size = (sum(hf.values()), *columns)
            add(layer, f"{name}.{kind}", size, Split.COLUMN, *pieces, groups=groups)

    def row(layer: int, name: str, hf: str, columns: int, bias: bool = False) -> None:
        """A row-parallel matrix, and its bias, which is added once the ranks' shares are summed."""
        plain(layer, f"{name}.weight", (d, columns), Split.ROW, f"{hf}.weight")
        if bias:
            plain(layer, f"{name}.bias", (d,), Split.REPLICATED, f"{hf}.bias")

    def metala(layer: int, block: str) -> None:
        mixer, mlp, f = f"{block}.token_mixer", f"{block}.channel_mixer", shape.intermediate_size
        norm(layer, "input_norm", f"{block}.token_norm")
        conv = (d, 1, shape.metala.conv_width)
        plain(layer, "mixer.conv1d.weight", conv, Split.REPLICATED, f"{mixer}.conv1d.weight")
        widths = {"q_proj": heads * key, "k_gate": heads * key, "v_proj": d, "g_proj": d}
        by_head = {f"{mixer}.{name}": width for name, width in widths.items()}
        column(layer, "mixer.in_proj", by_head, groups=heads)
        bias, aug = (heads, value), (heads, key)
        plain(layer, "mixer.out_gate_bias", bias, Split.COLUMN, f"{mixer}.g_proj.bias", flat=True)
        if shape.metala.self_augmentation:
            plain(layer, "mixer.aug_balance", aug, Split.COLUMN, f"{mixer}.aug_balance", flat=True)
        row(layer, "mixer.out_proj", f"{mixer}.out_proj", d)
        norm(layer, "mlp_norm", f"{block}.channel_norm")
        column(layer, "mlp.gate_up_proj", {f"{mlp}.l1": f, f"{mlp}.l2": f})
        row(layer, "mlp.down_proj", f"{mlp}.l3", f)

    def attention(layer: int, block: str, of: AttentionLayers) -> None:
        mixer, mlp, f = f"{block}.token_mixer", f"{block}.channel_mixer", of.intermediate_size
        norm(layer, "input_layernorm", f"{block}.token_norm")
        # Head by head where each has its own key; else all queries, all keys, all values.
        groups = heads if of.num_kv_heads == heads else 1
        widths = {"q_proj": d, "k_proj": of.num_kv_heads * value, "v_proj": of.num_kv_heads * value}
        qkv = {f"{mixer}.{name}": width for name, width in widths.items()}
        column(layer, "attention.query_key_value", qkv, groups, of.has_bias)
        row(layer, "attention.dense", f"{mixer}.out_proj", d, of.has_bias)
        norm(layer, "post_attention_layernorm", f"{block}.channel_norm")
        # GPT-NeoX activates the second half of its rows.
        column(layer, "mlp.linear1", {f"{mlp}.l2": f, f"{mlp}.l1": f}, bias=of.mlp_has_bias)
        row(layer, "mlp.linear2", f"{mlp}.l3", f, of.mlp_has_bias)

    embedding = (vocabulary, d)
    plain(0, "word_embeddings.weight", embedding, Split.VOCAB, "model.embed_tokens.weight")
    for i in range(shape.num_layers):
        if shape.is_attention(i):
            attention(block_layer(i), f"model.layers.{i}", shape.attention)
        else:
            metala(block_layer(i), f"model.layers.{i}")
    norm(norm_layer(shape), "norm", "model.final_norm")
    if not shape.tied:
        head = head_layer(shape)
        plain(head, "final_linear.weight", embedding, Split.VOCAB, "lm_head.weight")
    return rules


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises a ConvertError if a weight is NaN or infinite: the training had diverged."""
    if not tensor.numel():
        return
    low, high = torch.aminmax(tensor)  # NaN where there is one, in one pass without a copy
    if not (low.isfinite() and high.isfinite()):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise ConvertError(
            f"{name}: {bad} of {tensor.numel()} numbers are NaN or infinite, with which no model "
            "can run: has the training diverged? An earlier checkpoint may be sound"
        )


def fit_vocabulary(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """A vocabulary tensor cut to `rows`, or filled up to them with zeros."""
    if rows <= tensor.shape[0]:
        return tensor[:rows]
    padding = tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])
    return torch.cat([tensor, padding])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Equal tensors have equal bytes, also where they hold NaN."""
    return tensor.contiguous().view(torch.uint8)
