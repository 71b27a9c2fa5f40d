"""The model card of an exported folder: README.md with the Hub's metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from convert.tensor_table import tensor_table
from convert.verify import Comparison
from megatron_patch.architecture import Architecture

# What a reader of the model may want to know of the run, if the settings have it: nothing of the
# machines it ran on, their layout and their paths.
TRAINING_SETTINGS = (
    "seq_length",
    "train_batch_size",
    "train_iters",
    "optimizer",
    "lr_decay_style",
    "lr_decay_iters",
    "min_lr",
    "warmup",
    "weight_decay",
    "gradient_clipping",
    "hidden_dropout",
    "precision",
    "init_method",
    "output_layer_init_method",
    "init_method_std",
    "metala",
)

TEMPLATE = """\
---
{metadata}
---

# MetaLA, {parameters:,} parameters

A causal language model with [MetaLA](https://arxiv.org/abs/2411.10741) (Meta Linear Attention):
linear time in training, a state of constant size in generation. It was trained in
[GPT-NeoX](https://github.com/EleutherAI/gpt-neox).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
```

`trust_remote_code` runs the model's code that is in this folder; it is not needed where
`megatron_patch.hf` of the package `metala-neox` was imported.

## Architecture

{architecture}

## Training

- iteration: {iteration:,}
- tokens seen: {tokens}

```yaml
{training}
```

## Verification

{verification}
"""


def write_model_card(
    folder: Path,
    shape: Architecture,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    iteration: int,
    samples: int | None,
    comparison: Comparison | None,
) -> None:
    """Writes README.md.

    Args:
        folder: where to.
        shape: the model's shape as written.
        settings: the run's merged YAML settings.
        dtype: what most tensors were written in.
        iteration: the checkpoint's.
        samples: sequences trained on until then, `None` if not known.
        comparison: what `--verify` found, `None` if it was not asked for.
    """
    from huggingface_hub import ModelCard, ModelCardData

    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["metala", "linear-attention", "gpt-neox"],
    )
    parameters = sum(math.prod(rule.shape) for rule in tensor_table(shape))
    rows = {"parameters": f"{parameters:,}", "dtype": str(dtype).removeprefix("torch.")}
    rows |= shape.to_hf()
    training = {key: settings[key] for key in TRAINING_SETTINGS if settings.get(key) is not None}
    length = settings.get("seq_length")
    known = samples is not None and isinstance(length, int)
    card = TEMPLATE.format(
        metadata=metadata.to_yaml(),
        parameters=parameters,
        architecture="\n".join(
            ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
        ),
        iteration=iteration,
        tokens=f"{samples * length:,} ({samples:,} sequences of {length:,})"
        if known
        else "not recorded in the checkpoint",
        training=yaml.safe_dump(training, sort_keys=False, default_flow_style=None).strip(),
        verification=_verification(comparison),
    )
    ModelCard(card).save(folder / "README.md")


def _verification(comparison: Comparison | None) -> str:
    if comparison is None:
        return "Not done: exported without `--verify`."
    return (
        "GPT-NeoX's own layers, each tensor-parallel rank from its own files, and this model "
        f"computed the logits of the same random tokens in float32 on a CPU:\n{comparison}."
    )
