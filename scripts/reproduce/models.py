"""The models that the experiments compare, at equal width, depth and vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_patch.commands.command_line import CommandError
from megatron_patch.hf import MetaLAConfig, MetaLAForCausalLM
from megatron_patch.hf.layers_metala import MetaLATokenMixer

OURS = ("metala", "softmax", "hybrid", "window")
MODELS = (*OURS, "gla", "mamba")


@dataclass(frozen=True)
class Sizes:
    """Sizes and options of a model. Baselines take those that they have.

    Attributes:
        vocabulary, width, layers, heads: of the model.
        kernel_size: of the short convolution; 1 mixes no tokens.
        self_augmentation: whether MetaLA has it.
        expand_k: width of all keys over the width of the model.
        norm: of MetaLA and softmax: a `norm_type` of `MetaLAConfig`.
        tied: whether the head is the embedding; else it is a linear with a bias, as MAD's.
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
    tied: bool = True
    state: int = 16

    @property
    def mlp(self) -> int:
        """Width of the SwiGLU: 2.75 times that of the model, as in the released models."""
        return self.width * 11 // 4


class Scored(nn.Module):
    """A causal language model that computes logits only where they are scored.

    Args:
        body: maps tokens [B, T] to hidden states [B, T, D], which may be the first of several
            results.
        head: maps hidden states to logits.
    """

    def __init__(self, body: nn.Module, head: nn.Module):
        super().__init__()
        self.body, self.head = body, head

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens [B, T] to hidden states [B, T, D]."""
        hidden = self.body(tokens)
        return hidden if isinstance(hidden, torch.Tensor) else hidden[0]

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Maps tokens [B, T] and positions [B, P] to logits [B, P, vocabulary]."""
        return self.head(self.hidden(tokens).take_along_dim(positions[..., None], dim=1))


class Forget(nn.Module):
    """Gate logits that forget: decay 0 and key 1, so that a state holds one token."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns = columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_full((*x.shape[:-1], self.columns), -1e4)


def metala_config(name: str, sizes: Sizes, **others: Any) -> MetaLAConfig:
    """Returns the configuration of one of OURS.

    "softmax" is MetaLA's hybrid with attention layers alone and rotary position embeddings. In
    "hybrid" each fourth layer is one, without them: its other layers tell the order of tokens.

    Args:
        others: what to set beside `sizes`, or in its place.
    """
    values = dict(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.mlp,
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
        kinds = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
        values["layer_types"] = [kinds[layer % 4] for layer in range(sizes.layers)]
    return MetaLAConfig(**values | others)


def prepared(name: str, model: nn.Module) -> nn.Module:
    """Returns a MetaLA model as one of OURS. "window" forgets all but the short convolution's
    tokens: it shows what a model without memory can do."""
    if name == "window":
        for module in list(model.modules()):
            if isinstance(module, MetaLATokenMixer):
                module.k_gate = Forget(module.k_gate.out_features)
    return model


def build(name: str, sizes: Sizes) -> Scored:
    """Returns a new model, one of MODELS, with its library's initialisation.

    For OURS see `metala_config` and `prepared`. "gla" is flash-linear-attention's, "mamba" that of
    transformers, in twice the layers since it has no MLP. Raises a CommandError where a library is
    missing.
    """
    common = dict(vocab_size=sizes.vocabulary, hidden_size=sizes.width, use_cache=False,
                  pad_token_id=None, tie_word_embeddings=True)  # fmt: skip
    if name in OURS:
        model = prepared(name, MetaLAForCausalLM(metala_config(name, sizes)))
        body = model.model
    elif name == "gla":
        try:
            from fla.models import GLAConfig, GLAForCausalLM
        except ImportError:
            raise CommandError("gla: needs flash-linear-attention, which is not here") from None
        config = GLAConfig(
            **common,
            num_hidden_layers=sizes.layers,
            num_heads=sizes.heads,
            intermediate_size=sizes.mlp,
            expand_k=sizes.expand_k,
            expand_v=1.0,
            use_short_conv=sizes.kernel_size > 1,
            conv_size=sizes.kernel_size,
        )
        model = GLAForCausalLM(config)
        body = model.model
    elif name == "mamba":
        from transformers import MambaConfig, MambaForCausalLM

        config = MambaConfig(**common, num_hidden_layers=2 * sizes.layers, state_size=sizes.state)
        model = MambaForCausalLM(config)
        body = model.backbone
    else:
        raise CommandError(f"model: found {name}, wanted one of {', '.join(MODELS)}")
    return Scored(body, model.lm_head if sizes.tied else nn.Linear(sizes.width, sizes.vocabulary))
