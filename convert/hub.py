"""Writes the model card of an exported folder, and uploads the folder to the Hugging Face Hub."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import yaml

from convert.command import ConvertError
from convert.neox_reader import NeoXCheckpoint
from convert.tensor_table import tensor_table
from convert.verify import Comparison
from megatron_patch.architecture import Architecture
from megatron_patch.commands.command_line import first_line

# The settings that the model card quotes. They say nothing about machines, layouts and paths.
TRAINING_SETTINGS = """
    seq_length train_batch_size train_iters optimizer lr_decay_style lr_decay_iters min_lr
    warmup weight_decay gradient_clipping hidden_dropout precision init_method
    output_layer_init_method init_method_std metala
""".split()

TEMPLATE = """\
---
{metadata}
---

# MetaLA, {parameters:,} parameters

A {kind} with [MetaLA](https://arxiv.org/abs/2411.10741) (Meta Linear Attention):
linear time in training, a state of constant size in generation. It was trained in
[GPT-NeoX](https://github.com/EleutherAI/gpt-neox).

```python
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder, trust_remote_code=True)
```

`trust_remote_code` runs the model's code that is in this folder; it is not needed where
`megatron_patch.hf` of the package `metala-neox` was imported.

## Architecture

{architecture}

## Training

- iteration: {iteration:,}
- tokens seen: {tokens}
{documents}
```yaml
{training}
```

## Verification

{verification}
"""

KEPT_APART = """\
- the documents of a packed sample were kept apart (`reset_at_document`); to fine-tune or evaluate \
packed samples in the same way, give `position_ids`, `seq_idx` or `cu_seqlens`
"""
NOT_VERIFIED = "Not done: exported without `--verify`."
VERIFIED = """\
GPT-NeoX's own layers, each tensor-parallel rank from its own files, and this model \
computed the logits of the same random tokens in float32 on a CPU:
{}."""


def write_model_card(
    folder: Path,
    shape: Architecture,
    source: NeoXCheckpoint,
    dtype: torch.dtype,
    comparison: Comparison | None,
) -> None:
    """Writes README.md, the model card, for a model of `shape`, most of whose tensors have `dtype`.
    `comparison` is the result of `--verify`, `None` without it."""
    from huggingface_hub import ModelCard, ModelCardData

    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification" if shape.rewards else "text-generation",
        tags=["metala", "linear-attention", "gpt-neox"],
    )
    parameters = sum(math.prod(rule.shape) for rule in tensor_table(shape))
    rows = {"parameters": f"{parameters:,}", "dtype": str(dtype).removeprefix("torch.")}
    rows |= shape.to_hf()
    settings, samples = source.settings, source.samples
    training = {key: settings[key] for key in TRAINING_SETTINGS if settings.get(key) is not None}
    length = settings.get("seq_length")
    known = samples is not None and isinstance(length, int)
    card = TEMPLATE.format(
        metadata=metadata.to_yaml(),
        kind="reward model" if shape.rewards else "causal language model",
        auto_class="AutoModelForSequenceClassification"
        if shape.rewards
        else "AutoModelForCausalLM",
        parameters=parameters,
        architecture="\n".join(
            ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
        ),
        iteration=source.iteration,
        tokens=f"{samples * length:,} ({samples:,} sequences of {length:,})"
        if known
        else "not recorded in the checkpoint",
        documents=KEPT_APART if shape.metala.reset_at_document else "",
        training=yaml.safe_dump(training, sort_keys=False, default_flow_style=None).strip(),
        verification=NOT_VERIFIED if comparison is None else VERIFIED.format(comparison),
    )
    ModelCard(card).save(folder / "README.md")


# An earlier upload may have had other shards, and from_pretrained would load those.
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def check_push(repository: str) -> None:
    """Checks the name and the login, without the network, before any work is done. Raises a
    ConvertError if the name is malformed, or nobody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConvertError(f"--push-to-hub {repository}: {first_line(error)}") from None
    if get_token() is None:
        raise ConvertError(
            f"--push-to-hub {repository}: nobody is logged in; `hf auth login`, or set HF_TOKEN"
        )


def push_to_hub(folder: Path, repository: str, private: bool) -> str:
    """Uploads a Hugging Face folder as one commit to `repository`, NAME or OWNER/NAME, which is
    created if there is none. Replaces files of the same name and all weights. Returns the address.
    Raises a ConvertError if the upload failed; the folder is unchanged."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            delete_patterns=WEIGHTS,
            commit_message="Export from GPT-NeoX",
        )
    except Exception as error:  # the HTTP library changes with huggingface_hub's major version
        raise ConvertError(
            f"{folder} is complete, but was not uploaded to {repository}: {first_line(error)}; "
            f"`hf upload {repository} {folder}` tries again"
        ) from None
    return str(address)
