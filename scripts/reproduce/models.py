"""The models that the experiments compare, at equal width, depth and vocabulary.

All are MetaLA's model with another token mixer in each block: embedding, norms, SwiGLU and head are
the same. A mixer of another library has that library's initialisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from megatron_patch.commands.command_line import CommandError
from megatron_patch.hf import MetaLAConfig, MetaLAModel
from megatron_patch.hf.layers_metala import MetaLATokenMixer

OURS = ("metala", "softmax", "hybrid", "window")
MODELS = (*OURS, "gla", "mamba")
FUSED_LAYER_NORM = torch.cuda.is_available() and find_spec("triton") is not None


@dataclass(frozen=True)
class Sizes:
    """Sizes and options of a model. A mixer takes those that it has.

    Attributes:
        vocabulary, width, layers, heads: of the model.
        kernel_size: of MetaLA's short convolution; 1 mixes no tokens.
        self_augmentation: whether MetaLA has it.
        expand_k: width of all keys over the width of the model.
        norm: a `norm_type` of `MetaLAConfig`.
        mlp: width of the SwiGLU; `None` for 2.75 times that of the model, as in the released ones.
        mlp_beside_mamba: whether Mamba's blocks have a SwiGLU too.
        state: state size of a channel of Mamba.
    """

    vocabulary: int
    width: int
    layers: int = 2
    heads: int = 2
    kernel_size: int = 2
    self_augmentation: bool = True
    expand_k: float = 1.0
    norm: str = "layernorm"
    mlp: int | None = None
    mlp_beside_mamba: bool = False
    state: int = 16


class LanguageModel(nn.Module):
    """A causal language model that computes logits only where they are scored.

    Args:
        body: maps tokens [B, T] to hidden states [B, T, D], the first of its results.
        tied: whether the head is the embedding; else it is a linear with a bias, as MAD's.
    """

    def __init__(self, body: MetaLAModel, tied: bool = True):
        super().__init__()
        vocabulary, width = body.embed_tokens.weight.shape
        self.body = body
        self.head = nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.head.weight = body.embed_tokens.weight
        else:
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens [B, T] to hidden states [B, T, D]."""
        return self.body(tokens)[0]

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Maps tokens [B, T] and positions [B, P] to logits [B, P, vocabulary]; `None` for all
        positions."""
        hidden = self.hidden(tokens)
        if positions is not None:
            hidden = hidden.take_along_dim(positions[..., None], dim=1)
        return self.head(hidden)


class Foreign(nn.Module):
    """Another library's mixer, called as MetaLA's."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None]:
        mixed = self.mixer(x)
        return mixed if isinstance(mixed, torch.Tensor) else mixed[0], None, None


class Forget(nn.Module):
    """Gate logits that forget: decay 0 and key 1, so that a state holds one token."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns = columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_full((*x.shape[:-1], self.columns), -1e4)


class NoMLP(nn.Module):
    """Stands for a channel mixer: 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def in_autocast_dtype(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
    """Forward hook of a norm: casts its output once; autocast does it again for each linear that
    reads it. The convolution, and the sum of these linears' gradients, then have that dtype too."""
    device = output.device.type
    if torch.is_autocast_enabled(device):
        return output.to(torch.get_autocast_dtype(device))
    return output


def metala_config(name: str, sizes: Sizes, **others: Any) -> MetaLAConfig:
    """Returns the configuration of a model.

    "softmax" is MetaLA's hybrid with attention layers alone and rotary position embeddings. In
    "hybrid" each fourth layer is one, or the last where there are fewer than four, without them:
    its other layers tell the order of tokens.

    Args:
        others: what to set beside `sizes`, or in its place.
    """
    values = dict(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.mlp or sizes.width * 11 // 4,
        norm_type=sizes.norm,
        norm_eps=1e-5,
        conv_width=sizes.kernel_size,
        expand_k=sizes.expand_k,
        self_augmentation=sizes.self_augmentation,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    if name == "softmax":
        values |= dict(layer_types=["full_attention"] * sizes.layers, rope_theta=10000.0)
    elif name == "hybrid":
        if sizes.layers < 2:
            raise CommandError(f"hybrid: found {sizes.layers} layer, wanted at least 2")
        every = min(4, sizes.layers)
        values["layer_types"] = [
            "linear_attention" if (layer + 1) % every else "full_attention"
            for layer in range(sizes.layers)
        ]
    return MetaLAConfig(**values | others)


def build(name: str, sizes: Sizes, **others: Any) -> MetaLAModel:
    """Returns a new model without a head, one of MODELS.

    For OURS see `metala_config`. "window" is MetaLA which forgets all but the tokens of the short
    convolution: it shows what a model without memory can do. "gla" has the mixers of
    flash-linear-attention, without a short convolution, as in mad-lab and zoology; "mamba" those of
    transformers (inner width 2 d). Raises a CommandError where a library is missing.
    """
    if name not in MODELS:
        raise CommandError(f"model: found {name}, wanted one of {', '.join(MODELS)}")
    model = MetaLAModel(metala_config(name, sizes, **others))
    if name == "window":
        for module in list(model.modules()):
            if isinstance(module, MetaLATokenMixer):
                module.k_gate = Forget(module.k_gate.out_features)
    elif name not in OURS:
        mixers = _gla_mixers(sizes) if name == "gla" else _mamba_mixers(sizes)
        for layer, mixer in zip(model.layers, mixers, strict=True):
            layer.token_mixer = Foreign(mixer)
            if name == "mamba" and not sizes.mlp_beside_mamba:
                layer.channel_norm, layer.channel_mixer = nn.Identity(), NoMLP()
    if FUSED_LAYER_NORM:
        from layer_norm import fuse

        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                fuse(module)
    if name in OURS:
        for layer in model.layers:
            layer.token_norm.register_forward_hook(in_autocast_dtype)
            layer.channel_norm.register_forward_hook(in_autocast_dtype)
    return model


def _gla_mixers(sizes: Sizes) -> list[nn.Module]:
    try:
        from fla.models import GLAConfig, GLAModel
    except ImportError:
        raise CommandError("gla: needs flash-linear-attention, which is not here") from None
    config = GLAConfig(
        vocab_size=1, hidden_size=sizes.width, num_hidden_layers=sizes.layers, use_cache=False,
        num_heads=sizes.heads, expand_k=sizes.expand_k, expand_v=1.0, pad_token_id=None,
    )  # fmt: skip
    return [layer.attn for layer in GLAModel(config).layers]


def _mamba_mixers(sizes: Sizes) -> list[nn.Module]:
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(
        vocab_size=1, hidden_size=sizes.width, num_hidden_layers=sizes.layers, use_cache=False,
        state_size=sizes.state, expand=2, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        rescale_prenorm_residual=True,
    )  # fmt: skip
    return [layer.mixer for layer in MambaModel(config).layers]


def check_models(names: Sequence[str]) -> None:
    """Raises a CommandError if one of MODELS needs a library that is not here."""
    for name in names:
        build(name, Sizes(vocabulary=8, width=32))
