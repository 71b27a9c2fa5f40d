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
    """Sizes of a model.

    Attributes:
        vocabulary, width, layers, heads: of the model.
        kernel_size: of MetaLA's short convolution; 1 mixes no tokens.
        self_augmentation: whether MetaLA has it.
        expand_k: width of all keys over the width of the model.
    """

    vocabulary: int
    width: int
    layers: int = 2
    heads: int = 2
    kernel_size: int = 2
    self_augmentation: bool = True
    expand_k: float = 1.0

    @property
    def mlp(self) -> int:
        """Width of the SwiGLU: 2.75 times that of the model, as in the released models."""
        return self.width * 11 // 4


class Scored(nn.Module):
    """A causal language model that computes logits only where they are scored.

    Args:
        body: maps tokens [B, T] to hidden states [B, T, D].
        head: maps hidden states to logits.
    """

    def __init__(self, body: nn.Module, head: nn.Module):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Maps tokens [B, T] and positions [B, P] to logits [B, P, vocabulary]."""
        hidden = self.body(tokens)
        if not isinstance(hidden, torch.Tensor):
            hidden = hidden[0]
        return self.head(hidden.take_along_dim(positions[..., None], dim=1))


class Forget(nn.Module):
    """Gate logits that forget: decay 0 and key 1, so that a state holds one token."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns = columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_full((*x.shape[:-1], self.columns), -1e4)


def metala_config(name: str, sizes: Sizes, **others: Any) -> MetaLAConfig:
    """Returns the configuration of one of OURS, with LayerNorms.

    "softmax" is MetaLA's hybrid with attention layers alone, with rotary position embeddings. In
    "hybrid" each fourth layer is one, without them: its other layers tell the order of tokens.

    Args:
        others: what to set beside `sizes`, or in its place.
    """
    attention: dict[str, Any] = {}
    if name == "softmax":
        attention = dict(layer_types=["full_attention"] * sizes.layers, rope_theta=10000.0)
    elif name == "hybrid":
        kinds = ("full_attention" if index % 4 == 3 else "linear_attention"
                 for index in range(sizes.layers))  # fmt: skip
        attention = dict(layer_types=list(kinds))
    return MetaLAConfig(
        **dict(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.mlp,
            norm_type="layernorm",
            norm_eps=1e-5,
            tie_word_embeddings=True,
            conv_width=sizes.kernel_size,
            expand_k=sizes.expand_k,
            self_augmentation=sizes.self_augmentation,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            **attention,
        )
        | others
    )


def prepared(name: str, model: nn.Module) -> nn.Module:
    """Returns a MetaLA model as one of OURS. "window" forgets all but the short convolution's
    tokens: it is what a model without memory can do."""
    if name == "window":
        for module in list(model.modules()):
            if isinstance(module, MetaLATokenMixer):
                module.k_gate = Forget(module.k_gate.out_features)
    return model


def build(name: str, sizes: Sizes) -> Scored:
    """Returns a new model, one of MODELS.

    All tie the head to the embedding, as zoology does, and all but "mamba" have norms and a SwiGLU
    in each layer. For OURS see `metala_config` and `prepared`. "gla" is
    flash-linear-attention's, "mamba" that of mamba_ssm. Raises a CommandError where these are not
    installed.
    """
    common = dict(vocab_size=sizes.vocabulary, hidden_size=sizes.width)
    if name in OURS:
        model = prepared(name, MetaLAForCausalLM(metala_config(name, sizes)))
        return Scored(model.model, model.lm_head)
    if name == "gla":
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
            tie_word_embeddings=True,
            pad_token_id=None,
            use_cache=False,
        )
        model = GLAForCausalLM(config)
        return Scored(model.model, model.lm_head)
    if name == "mamba":
        try:
            from mamba_ssm.models.config_mamba import MambaConfig
            from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
        except ImportError:
            raise CommandError("mamba: needs mamba_ssm, which is not here") from None
        config = MambaConfig(d_model=sizes.width, n_layer=sizes.layers, vocab_size=sizes.vocabulary)
        model = MambaLMHeadModel(config)
        return Scored(model.backbone, model.lm_head)
    raise CommandError(f"model: found {name}, wanted one of {', '.join(MODELS)}")
