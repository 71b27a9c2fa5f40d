"""The description of a model, under the name that its copy has in an exported model folder."""

from megatron_patch.architecture import MODEL_OPTIONS, Architecture

__all__ = ["MODEL_OPTIONS", "Architecture"]
