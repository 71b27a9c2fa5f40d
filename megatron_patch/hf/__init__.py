"""MetaLA for Hugging Face transformers. Importing it registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from megatron_patch.hf.cache_metala import MetaLACache
from megatron_patch.hf.configuration_metala import MetaLAConfig
from megatron_patch.hf.modeling_metala import (
    MetaLAForCausalLM,
    MetaLAForSequenceClassification,
    MetaLAModel,
    MetaLAPreTrainedModel,
)

AutoConfig.register(MetaLAConfig.model_type, MetaLAConfig, exist_ok=True)
AutoModel.register(MetaLAConfig, MetaLAModel, exist_ok=True)
AutoModelForCausalLM.register(MetaLAConfig, MetaLAForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    MetaLAConfig, MetaLAForSequenceClassification, exist_ok=True
)

__all__ = [
    "MetaLACache",
    "MetaLAConfig",
    "MetaLAForCausalLM",
    "MetaLAForSequenceClassification",
    "MetaLAModel",
    "MetaLAPreTrainedModel",
]
