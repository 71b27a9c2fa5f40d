"""The description of a model, under the name that its copy has in an exported model folder."""

from megatron_patch.architecture import MODEL_OPTIONS, QUERY_GATE_GAIN, Architecture

__all__ = ["MODEL_OPTIONS", "QUERY_GATE_GAIN", "Architecture"]
