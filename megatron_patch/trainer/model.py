"""Builds the Hugging Face model and the tokenizer that GPT-NeoX's settings describe."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from transformers import set_seed

from convert.command import ConvertError
from convert.tokenizer import RunTokenizer, read_tokenizer_file
from megatron_patch.architecture import SettingsError
from megatron_patch.architecture_neox import from_neox, with_defaults
from megatron_patch.hf import MetaLAConfig, MetaLAForCausalLM
from megatron_patch.trainer.settings import TrainerSettings

# GPT-NeoX's HFTokenizer looks these tokens up by name.
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"


def load_tokenizer(settings: TrainerSettings) -> RunTokenizer:
    """Returns the tokenizer of `vocab_file`, a tokenizer.json. Raises a SettingsError if the file
    is no tokenizer, or has no <|endoftext|>."""
    try:
        tokenizer = read_tokenizer_file(
            Path(settings.vocab_file),
            begin=[END_OF_TEXT],
            end=[END_OF_TEXT],
            padding=[PADDING, END_OF_TEXT],
        )
    except ConvertError as error:
        raise SettingsError(f"vocab_file: {error}") from None
    if tokenizer.special["eos_token_id"] is None:
        raise SettingsError(f"vocab_file: {settings.vocab_file} has no token {END_OF_TEXT}")
    return tokenizer


def model_config(settings: TrainerSettings, tokenizer: RunTokenizer) -> MetaLAConfig:
    """Returns the model's configuration. Its vocabulary is the tokenizer's, without the rows that
    GPT-NeoX adds as padding."""
    model = from_neox(with_defaults(settings.model_dump(mode="json")), tokenizer.size)
    return MetaLAConfig(
        **model.to_hf(),
        **tokenizer.special,
        tokenizer_class="PreTrainedTokenizerFast",  # for transformers 4's `pipeline`
    )


def check_model(config: MetaLAConfig, checkpoint: Path) -> None:
    """Checks that a checkpoint holds this model. The Trainer silently loads only what fits. Raises
    a SettingsError that names the option that differs."""
    wanted, saved = config.to_dict(), MetaLAConfig.from_pretrained(checkpoint).to_dict()
    not_the_models = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
    for name in sorted((wanted.keys() & saved.keys()) - not_the_models):
        if name[0] != "_" and wanted[name] != saved[name]:
            raise SettingsError(
                f"load: found {name} {saved[name]!r} in {checkpoint}, wanted {wanted[name]!r} as "
                "the settings say"
            )


def build_model(settings: TrainerSettings, config: MetaLAConfig) -> MetaLAForCausalLM:
    """Returns a new model, initialised as `metala.init` says; `MetaLAForCausalLM` itself uses the
    authors' initialisation."""
    set_seed(settings.seed)
    model = MetaLAForCausalLM(config)
    if settings.metala_options.init == "neox":
        _initialize_as_neox(model, settings)
    return model


def _initialize_as_neox(model: nn.Module, settings: TrainerSettings) -> None:
    """Applies `output_layer_init_method` to the two matrices of a layer that write to the residual
    stream, and `init_method` to all others."""
    std = output_std = settings.init_method_std
    if settings.output_layer_init_method == "scaled_normal":
        output_std /= math.sqrt(2 * settings.num_layers)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes_residual = name.endswith(("token_mixer.out_proj", "channel_mixer.l3"))
                nn.init.normal_(module.weight, std=output_std if writes_residual else std)
