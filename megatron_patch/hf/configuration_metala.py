"""Configuration of MetaLA models, under the key names of the authors' released checkpoints."""

from __future__ import annotations

import os
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from .architecture_metala import MODEL_OPTIONS, Architecture

GLU_ACTIVATIONS = ("silu", "swish")
# Keys that only hybrids use. The files of other models are written without them.
HYBRID_KEYS = """
    layer_types num_key_value_heads attention_bias attention_glu_dim attention_glu_bias
    rope_theta partial_rotary_factor
""".split()


class MetaLAConfig(PretrainedConfig):
    """Configuration of a MetaLA model (arXiv 2411.10741).

    The defaults are those of the released 0.38B model. The first group of arguments has the keys of
    the authors' `config.json`. The second group is ours; its defaults are the constants of the
    authors' code. The third is for hybrids, which also have layers of softmax attention. The
    standard names `hidden_size`, `num_hidden_layers`, `num_attention_heads` and `intermediate_size`
    read and write the authors' keys. Unknown keys are kept.

    Args:
        vocab_size: rows of the embedding and of the head.
        decoder_embed_dim: width d of the model, a multiple of the number of heads.
        decoder_layers: number of blocks.
        decoder_attention_heads: H. Keys are expand_k d / H wide, values d / H.
        glu_dim: width of the MLP; -1 for d.
        glu_act: "silu" or "swish", two names of one function.
        bias: whether the three projections of the MLP have biases.
        norm_type: "simplermsnorm" (no parameters), "rmsnorm" (a weight per channel) or "layernorm"
            (weight and bias).
        no_scale_embedding: if false, embeddings are multiplied by sqrt(d).
        init_std: standard deviation of new linear and embedding weights.
        use_cache: whether the model returns its state outside of training.
        pad_token_id, bos_token_id, eos_token_id: special tokens.
        tie_word_embeddings: whether the head shares the weight of the embedding.

        norm_eps: epsilon of the norms of the blocks and of the last norm.
        tau: divides the log decay; above 0.
        conv_width: kernel size of the short convolution, at least 1.
        expand_k: width of queries and gates over all heads, as a multiple of d.
        self_augmentation: whether the read-out has the self-augmentation term.
        output_norm_eps: epsilon of the LayerNorm over each head's output.
        reset_at_document: whether the documents of a packed sample were kept apart in training. It
            records that; the model itself keeps documents apart where a call says where they
            begin.

        layer_types: for each layer "linear_attention" (MetaLA) or "full_attention" (causal softmax
            attention with `decoder_attention_heads` heads); `None` for MetaLA alone.
        num_key_value_heads: number of key-value heads in attention layers, a divisor of
            `decoder_attention_heads`; `None` for as many.
        attention_bias: whether the four projections of attention layers have biases.
        attention_glu_dim: width of the MLP in attention layers; `None` for `glu_dim`.
        attention_glu_bias: whether the projections of that MLP have biases.
        rope_theta: base of the rotary position embeddings in attention layers; `None` for no
            position embeddings.
        partial_rotary_factor: fraction of a head's channels that are rotated.

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
    # For transformers 5, whose default FSDP plan expects another name for the last norm.
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
        norm_eps: float = 1e-6,
        layer_types: list[str] | None = None,
        num_key_value_heads: int | None = None,
        attention_bias: bool = False,
        attention_glu_dim: int | None = None,
        attention_glu_bias: bool = False,
        rope_theta: float | None = None,
        partial_rotary_factor: float = 1.0,
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
        self.norm_eps = norm_eps
        for name, default in MODEL_OPTIONS.items():
            setattr(self, name, kwargs.pop(name, default))
        self.num_key_value_heads = num_key_value_heads
        self.attention_bias = attention_bias
        self.attention_glu_dim = attention_glu_dim
        self.attention_glu_bias = attention_glu_bias
        self.rope_theta = rope_theta
        self.partial_rotary_factor = partial_rotary_factor
        # Sets standard names in kwargs (hidden_size=...), which overwrite the above through
        # `attribute_map`.
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        # Not passed on, since transformers 5 would check it with other messages.
        self.layer_types = layer_types
        if self.glu_dim == -1:
            self.glu_dim = self.decoder_embed_dim
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.decoder_attention_heads
        if self.attention_glu_dim is None:
            self.attention_glu_dim = self.glu_dim
        self.check_values()

    def check_values(self) -> None:
        """Raises a ValueError that names the first key whose value cannot be used."""
        for key in ("bias", "no_scale_embedding", "use_cache"):
            if not isinstance(value := getattr(self, key), bool):
                raise ValueError(f"{key}: found {value!r}, wanted true or false")
        if self.glu_act not in GLU_ACTIVATIONS:
            known = ", ".join(GLU_ACTIVATIONS)
            raise ValueError(f"glu_act: found {self.glu_act!r}, wanted one of {known}")
        Architecture.from_hf(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns transformers' dictionary, without the hybrids' keys if this is no hybrid."""
        values = super().to_dict()
        if not self.is_hybrid:
            for key in HYBRID_KEYS:
                values.pop(key, None)
        return values

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves the configuration, with the model's code if it names any (`auto_map`)."""
        # With `_auto_class`, the class came from a model folder, whose code transformers copies.
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
        """K, the width of the queries and keys of a head."""
        return round(self.expand_k * self.decoder_embed_dim / self.decoder_attention_heads)

    @property
    def head_value_dim(self) -> int:
        """V, the width of the values of a head."""
        return self.decoder_embed_dim // self.decoder_attention_heads

    @property
    def is_hybrid(self) -> bool:
        """Returns whether `layer_types` names the type of each layer."""
        return self.layer_types is not None

    def is_attention(self, layer: int) -> bool:
        """Returns whether a layer has softmax attention."""
        return self.is_hybrid and self.layer_types[layer] == "full_attention"

    @property
    def rotary_dim(self) -> int:
        """Number of channels of a head that are rotated."""
        return int(self.head_value_dim * self.partial_rotary_factor)


if __name__.startswith("transformers_modules."):
    # Loaded from a model folder, so save this code with the model.
    MetaLAConfig.register_for_auto_class()

__all__ = ["MetaLAConfig"]
