"""Configuration of MetaLA models, under the key names of the authors' released checkpoints."""

from __future__ import annotations

import os
from typing import Any

from transformers.configuration_utils import PretrainedConfig

NORM_TYPES = ("simplermsnorm", "rmsnorm")
GLU_ACTIVATIONS = ("silu", "swish")


class MetaLAConfig(PretrainedConfig):
    """Sizes and options of a MetaLA model (arXiv 2411.10741).

    The defaults are the released 0.38B model's. The first group of keys is that of the authors'
    `config.json`; the second is ours, and its defaults are the values that the authors' code has
    fixed. The standard names `hidden_size`, `num_hidden_layers`, `num_attention_heads` and
    `intermediate_size` read and write the authors' keys. Unknown keys are kept.

    Args:
        vocab_size: rows of the embedding and of the head.
        decoder_embed_dim: model width d, a multiple of twice the number of heads.
        decoder_layers: number of blocks.
        decoder_attention_heads: H; keys are d / 2H wide, values d / H.
        glu_dim: width of the MLP; -1 for d.
        glu_act: "silu" or "swish", two names of one function.
        bias: whether the three MLP projections have biases.
        norm_type: "simplermsnorm" (no parameters) or "rmsnorm" (a weight per channel).
        no_scale_embedding: if false, embeddings are multiplied by sqrt(d).
        init_std: standard deviation of new linear and embedding weights.
        use_cache: whether the model returns its state when it is not training.
        pad_token_id, bos_token_id, eos_token_id: special tokens.
        tie_word_embeddings: whether the head is the embedding.

        tau: divides the log decay, above 0.
        conv_width: taps of the short convolution, at least 1.
        self_augmentation: whether the read-out has the self-augmentation term.
        norm_eps: epsilon of the two norms of a block and of the last one.
        output_norm_eps: epsilon of the LayerNorm over each head's output.

    Raises:
        ValueError: a value cannot be used; the message names its key.
    """

    model_type = "metala"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "intermediate_size": "glu_dim",
    }
    # For the FSDP of transformers 5, whose default plan has another name for the last norm.
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
        "final_norm": "keep_full_weight",
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        decoder_embed_dim: int = 1024,
        decoder_layers: int = 24,
        decoder_attention_heads: int = 8,
        glu_dim: int = 2816,
        glu_act: str = "silu",
        bias: bool = False,
        norm_type: str = "simplermsnorm",
        no_scale_embedding: bool = True,
        init_std: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = 2,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        tau: float = 16.0,
        conv_width: int = 4,
        self_augmentation: bool = True,
        norm_eps: float = 1e-6,
        output_norm_eps: float = 1e-5,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.decoder_embed_dim = decoder_embed_dim
        self.decoder_layers = decoder_layers
        self.decoder_attention_heads = decoder_attention_heads
        self.glu_dim = glu_dim
        self.glu_act = glu_act
        self.bias = bias
        self.norm_type = norm_type
        self.no_scale_embedding = no_scale_embedding
        self.init_std = init_std
        self.use_cache = use_cache
        self.tau = tau
        self.conv_width = conv_width
        self.self_augmentation = self_augmentation
        self.norm_eps = norm_eps
        self.output_norm_eps = output_norm_eps
        # Standard names among the kwargs (hidden_size=...) overwrite the above through
        # `attribute_map`.
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        if self.glu_dim == -1:
            self.glu_dim = self.decoder_embed_dim
        self.check_values()

    def check_values(self) -> None:
        """Raises a ValueError that names the first key whose value cannot be used."""
        for key in (
            "vocab_size",
            "decoder_embed_dim",
            "decoder_layers",
            "decoder_attention_heads",
            "glu_dim",
            "conv_width",
        ):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key}: found {value!r}, wanted a whole number of at least 1")
        for key in ("tau", "init_std", "norm_eps", "output_norm_eps"):
            value = getattr(self, key)
            if (
                not isinstance(value, (int, float))
                or isinstance(value, bool)
                or not 0 < value < 1e30
            ):
                raise ValueError(f"{key}: found {value!r}, wanted a number above 0")
        for key in (
            "bias",
            "no_scale_embedding",
            "self_augmentation",
            "use_cache",
            "tie_word_embeddings",
        ):
            value = getattr(self, key)
            if not isinstance(value, bool):
                raise ValueError(f"{key}: found {value!r}, wanted true or false")
        for key, known in (("norm_type", NORM_TYPES), ("glu_act", GLU_ACTIVATIONS)):
            value = getattr(self, key)
            if value not in known:
                raise ValueError(f"{key}: found {value!r}, wanted one of {', '.join(known)}")
        if self.decoder_embed_dim % (2 * self.decoder_attention_heads):
            raise ValueError(
                f"decoder_embed_dim: found {self.decoder_embed_dim} with decoder_attention_heads "
                f"{self.decoder_attention_heads}, wanted a multiple of twice the heads, "
                f"{2 * self.decoder_attention_heads}"
            )

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As transformers does it. If the configuration names model code (`auto_map`), that code
        is written beside it, whether it was loaded from there or is this package's."""
        # `_auto_class`: loaded from a model folder, whose files transformers copies.
        if self._auto_class is None and getattr(self, "auto_map", None):
            try:
                from megatron_patch.hf.remote_code import AUTO_MAP, write_model_code
            except ImportError:
                pass
            else:
                os.makedirs(save_directory, exist_ok=True)
                write_model_code(save_directory)
                self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def head_key_dim(self) -> int:
        """K, the width of a head's queries and keys."""
        return self.decoder_embed_dim // (2 * self.decoder_attention_heads)

    @property
    def head_value_dim(self) -> int:
        """V, the width of a head's values."""
        return self.decoder_embed_dim // self.decoder_attention_heads


if __name__.startswith("transformers_modules."):
    # Loaded from a model folder: saved with this code.
    MetaLAConfig.register_for_auto_class()

__all__ = ["MetaLAConfig"]
