"""The tensors of a MetaLA model in GPT-NeoX and in Hugging Face.

`tensor_table` names every tensor once: its GPT-NeoX name and shape, how tensor parallelism splits
it, and the Hugging Face tensors inside it. A `TensorRule` converts both ways (`to_hf`, `from_hf`),
and merges and splits shards (`merge`, `shard`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from convert.command import ConvertError
from megatron_patch.architecture import Architecture

# The tensors of each norm: GPT-NeoX's name and the Hugging Face name.
NORM_TENSORS: dict[str, dict[str, str]] = {
    "simplermsnorm": {},
    "rmsnorm": {"scale": "weight"},
    "layernorm": {"weight": "weight", "bias": "bias"},
}


class Split(enum.Enum):
    """How tensor parallelism splits a tensor."""

    REPLICATED = "replicated"  # a copy on every rank
    COLUMN = "column"  # column-parallel: dim 0, see `TensorRule.groups`
    ROW = "row"  # row-parallel: dim 1
    VOCAB = "vocabulary"  # dim 0, padding rows at the end


@dataclass(frozen=True)
class Piece:
    """A Hugging Face tensor inside a GPT-NeoX tensor: `rows` consecutive rows of each group."""

    name: str
    rows: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorRule:
    """One GPT-NeoX tensor.

    Attributes:
        layer: index of its layer, as in `layer_{index}-…` and `sequential.{index}.…`.
        name: its name inside that layer.
        shape: its shape over all ranks.
        split: how tensor parallelism splits it.
        pieces: the Hugging Face tensors, in their order inside a group.
        groups: the number of equal groups (for `mixer.in_proj`, heads) along dim 0. Each group
            holds rows of every piece, and a column split gives each rank whole groups. With one
            group the pieces are stacked (`mlp.gate_up_proj`), and each rank holds its part of
            every piece.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    split: Split
    pieces: tuple[Piece, ...]
    groups: int = 1

    @property
    def _dim(self) -> int:
        """Returns the dimension that is split."""
        return 1 if self.split is Split.ROW else 0

    @property
    def _is_stacked(self) -> bool:
        """Returns whether each rank holds a part of every piece, stacked."""
        return self.split is Split.COLUMN and self.groups == 1 and len(self.pieces) > 1

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the Hugging Face tensors by name, as views of `full` where possible."""
        grouped = full.unflatten(0, (self.groups, -1))
        parts = grouped.split([piece.rows for piece in self.pieces], dim=1)
        return {
            piece.name: part.reshape(piece.shape)
            for piece, part in zip(self.pieces, parts, strict=True)
        }

    def from_hf(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the GPT-NeoX tensor; the inverse of `to_hf`."""
        parts = [
            tensors[piece.name].reshape(self.groups, piece.rows, *self.shape[1:])
            for piece in self.pieces
        ]
        return torch.cat(parts, dim=1).reshape(self.shape)

    def shard_shape(self, degree: int) -> tuple[int, ...]:
        """Returns the shape on one of `degree` ranks."""
        shape = list(self.shape)
        if self.split is not Split.REPLICATED:
            shape[self._dim] //= degree
        return tuple(shape)

    def shard(self, full: torch.Tensor, degree: int, rank: int) -> torch.Tensor:
        """Returns the shard of `rank` out of `degree`, possibly a view of `full`."""
        if self.split is Split.REPLICATED:
            return full
        if not self._is_stacked:
            return full.chunk(degree, dim=self._dim)[rank]
        pieces = full.split([piece.rows for piece in self.pieces])
        return torch.cat([piece.chunk(degree)[rank] for piece in pieces])

    def merge(
        self,
        shards: Sequence[torch.Tensor],
        files: Sequence[object],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the full tensor of the shards in rank order; the inverse of `shard`. Raises a
        ConvertError, which tells the ranks' `files`, if replicated copies differ in any bit.

        `out` is uint8 memory for the result, which stays valid until `out` is used again.
        Allocating new memory for each tensor takes longer than merging.
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
        parts = list(shards)
        if self._is_stacked:
            rows = [piece.rows // len(shards) for piece in self.pieces]
            by_piece = zip(*(shard.split(rows) for shard in shards), strict=True)
            parts = [part for piece in by_piece for part in piece]
        if out is not None:
            shape = list(parts[0].shape)
            shape[self._dim] = sum(part.shape[self._dim] for part in parts)
            size = sum(part.nbytes for part in parts)
            out = out[:size].view(parts[0].dtype).view(shape)
        return torch.cat(parts, dim=self._dim, out=out)


def tensor_table(shape: Architecture) -> list[TensorRule]:
    """Returns the rules of all tensors of a model, layer by layer."""
    n, vocabulary = shape.num_layers, (shape.padded_vocab_size, shape.hidden_size)
    embedding = {"model.embed_tokens.weight": vocabulary}
    rules = [_rule(0, "word_embeddings.weight", Split.VOCAB, embedding)]
    for i in range(n):
        block = _attention_block if shape.is_attention(i) else _metala_block
        rules += block(shape, i + 2, f"model.layers.{i}")
    rules += _norm(shape, n + 3, "norm", "model.final_norm")
    if shape.rewards:
        head = {"score.weight": (1, shape.hidden_size)}
        rules.append(_rule(n + 4, "rm_linear.weight", Split.ROW, head))
    elif not shape.tied:
        head = {"lm_head.weight": vocabulary}
        rules.append(_rule(n + 4, "final_linear.weight", Split.VOCAB, head))
    return rules


def _metala_block(shape: Architecture, layer: int, block: str) -> list[TensorRule]:
    """Returns the rules of `ParallelMetaLALayer`: mixer and SwiGLU MLP, each after its norm."""
    norm, rule, linear = _builders(shape, layer)
    d, f, heads, qk = shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.key_width
    mixer, mlp = f"{block}.token_mixer", f"{block}.channel_mixer"
    in_proj = {
        f"{mixer}.q_proj": (heads * qk, d),
        f"{mixer}.k_gate": (heads * qk, d),
        f"{mixer}.v_proj": (d, d),
        f"{mixer}.g_proj": (d, d),
    }
    conv = {f"{mixer}.conv1d.weight": (d, 1, shape.metala.conv_width)}
    gate_bias, aug = {f"{mixer}.g_proj.bias": (d,)}, {f"{mixer}.aug_balance": (heads * qk,)}
    aug_rule = rule("mixer.aug_balance", Split.COLUMN, aug, (heads, qk))
    return [
        *norm("input_norm", f"{block}.token_norm"),
        rule("mixer.conv1d.weight", Split.REPLICATED, conv),
        *linear("mixer.in_proj", Split.COLUMN, in_proj, groups=heads),
        rule("mixer.out_gate_bias", Split.COLUMN, gate_bias, (heads, shape.value_width)),
        *([aug_rule] if shape.metala.self_augmentation else []),
        *linear("mixer.out_proj", Split.ROW, {f"{mixer}.out_proj": (d, d)}),
        *norm("mlp_norm", f"{block}.channel_norm"),
        *linear("mlp.gate_up_proj", Split.COLUMN, {f"{mlp}.l1": (f, d), f"{mlp}.l2": (f, d)}),
        *linear("mlp.down_proj", Split.ROW, {f"{mlp}.l3": (d, f)}),
    ]


def _attention_block(shape: Architecture, layer: int, block: str) -> list[TensorRule]:
    """Returns the rules of GPT-NeoX's `ParallelTransformerLayer`: attention and SwiGLU MLP."""
    norm, _, linear = _builders(shape, layer)
    options = shape.attention
    d, f, kv_heads = shape.hidden_size, options.intermediate_size, options.num_kv_heads
    kv, bias, mlp_bias = kv_heads * shape.value_width, options.has_bias, options.mlp_has_bias
    mixer, mlp = f"{block}.token_mixer", f"{block}.channel_mixer"
    # Multi-head attention orders the rows head by head, grouped-query attention stacks q, k, v.
    groups = kv_heads if kv_heads == shape.num_heads else 1
    qkv = {f"{mixer}.q_proj": (d, d), f"{mixer}.k_proj": (kv, d), f"{mixer}.v_proj": (kv, d)}
    up_gate = {f"{mlp}.l2": (f, d), f"{mlp}.l1": (f, d)}  # GPT-NeoX activates the second half
    return [
        *norm("input_layernorm", f"{block}.token_norm"),
        *linear("attention.query_key_value", Split.COLUMN, qkv, groups, bias),
        *linear("attention.dense", Split.ROW, {f"{mixer}.out_proj": (d, d)}, bias=bias),
        *norm("post_attention_layernorm", f"{block}.channel_norm"),
        *linear("mlp.linear1", Split.COLUMN, up_gate, bias=mlp_bias),
        *linear("mlp.linear2", Split.ROW, {f"{mlp}.l3": (d, f)}, bias=mlp_bias),
    ]


def _builders(shape: Architecture, layer: int) -> tuple[Callable, Callable, Callable]:
    """Returns `_norm`, `_rule` and `_linear` for one layer."""
    return partial(_norm, shape, layer), partial(_rule, layer), partial(_linear, layer)


def _norm(shape: Architecture, layer: int, name: str, hf: str) -> list[TensorRule]:
    return [
        _rule(layer, f"{name}.{own}", Split.REPLICATED, {f"{hf}.{theirs}": (shape.hidden_size,)})
        for own, theirs in NORM_TENSORS[shape.norm].items()
    ]


def _linear(
    layer: int,
    name: str,
    split: Split,
    hf: Mapping[str, tuple[int, int]],
    groups: int = 1,
    bias: bool = False,
) -> list[TensorRule]:
    """Returns the rules of a linear layer's weight and, if it has one, its bias. The bias of a
    row-parallel layer is replicated: it is added after the all-reduce of the partial sums."""
    weights = {f"{hf_name}.weight": size for hf_name, size in hf.items()}
    rules = [_rule(layer, f"{name}.weight", split, weights, groups=groups)]
    if bias:
        biases = {f"{hf_name}.bias": size[:1] for hf_name, size in hf.items()}
        bias_split = Split.COLUMN if split is Split.COLUMN else Split.REPLICATED
        rules.append(_rule(layer, f"{name}.bias", bias_split, biases, groups=groups))
    return rules


def _rule(
    layer: int,
    name: str,
    split: Split,
    hf: Mapping[str, tuple[int, ...]],
    shape: tuple[int, ...] | None = None,
    groups: int = 1,
) -> TensorRule:
    """Returns a rule, made from the shapes of its Hugging Face tensors. `shape` is only given for a
    tensor that is [heads, width] in GPT-NeoX and [heads * width] in Hugging Face."""
    rows = {hf_name: shape[0] if shape else size[0] // groups for hf_name, size in hf.items()}
    pieces = tuple(Piece(hf_name, rows[hf_name], size) for hf_name, size in hf.items())
    inner = next(iter(hf.values()))[1:]
    return TensorRule(
        layer, name, shape or (sum(rows.values()) * groups, *inner), split, pieces, groups
    )


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises a ConvertError if a weight is NaN or infinite, as after a training that diverged."""
    if not tensor.numel():
        return
    low, high = torch.aminmax(tensor)  # propagates NaN; one pass without a copy
    if not (low.isfinite() and high.isfinite()):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise ConvertError(
            f"{name}: {bad} of {tensor.numel()} numbers are NaN or infinite, with which no model "
            "can run: has the training diverged? An earlier checkpoint may be sound"
        )


def fit_vocabulary(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Returns a vocabulary tensor cut to `rows`, or padded to them with zeros."""
    if rows <= tensor.shape[0]:
        return tensor[:rows]
    padding = tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])
    return torch.cat([tensor, padding])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a tensor, which compare equal also where both hold the same NaN."""
    return tensor.contiguous().view(torch.uint8)
