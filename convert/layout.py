"""What a layout of tensor-parallel ranks asks of a model."""

from __future__ import annotations

from convert.command import ConvertError
from megatron_patch.architecture import Architecture


def check_tensor_parallel(shape: Architecture, degree: int) -> None:
    """Raises a ConvertError if the model cannot be split over `degree` ranks."""
    sizes = [
        ("num_attention_heads", shape.num_heads),
        ("intermediate_size", shape.intermediate_size),
        ("the padded vocabulary", shape.padded_vocab_size),
    ]
    if shape.attention:
        sizes.append(("num_kv_heads", shape.attention.num_kv_heads))
        sizes.append(("the MLP of attention layers", shape.attention.intermediate_size))
    for name, size in sizes:
        if size % degree:
            raise ConvertError(f"tensor parallel {degree} does not divide {name}, {size}")
