"""Compares a run's settings with those of the checkpoint that it loads.

GPT-NeoX compares sizes alone. Of two models of the same sizes it takes the one that the settings
describe: weights that were trained with `metala: {tau: 16}` then compute another function with
`tau: 8`. Tensors of other shapes end the ranks in a traceback.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_patch.architecture import (
    METALA,
    NORM_EPSILON,
    SOFTMAX_TYPES,
    SettingsError,
    refuse,
    shown,
)
from megatron_patch.architecture_neox import from_neox, with_defaults
from megatron_patch.neox.notices import say
from megatron_patch.neox.this_process import in_launcher

# What a fine-tuning may change, since the weights stay as they are.
_FREE = (
    "metala.tau metala.output_norm_eps metala.reset_at_document rotary_emb_base rotary_pct"
).split() + sorted(set(NORM_EPSILON.values()))
# By these GPT-NeoX chooses the samples and their order.
OF_DATA = """
    seq_length seed split data_path train_data_paths train_data_weights pack_impl allow_chopped
""".split()


def check_model(args: Any, saved: dict[str, Any], step: Path, is_training: bool) -> None:
    """Compares the model of the settings with that of a checkpoint's YAML files. Raises a
    SettingsError that names the first setting that differs. In a fine-tuning a setting that changes
    no shape may differ, and the launcher prints a line."""
    try:
        before = _facts(with_defaults(saved))
    except SettingsError as error:
        raise SettingsError(f"load: {step / 'configs'}: {error}") from None
    now = _facts(args)
    if in_launcher():  # which tells it once
        _tell_of_another_tokenizer(args, saved, step)
    if not is_training:  # a prompt is one document
        before.pop("metala.reset_at_document")
    for name, was in before.items():
        found = now.get(name)
        if found == was:
            continue
        if not (is_training and args.finetune and name in _FREE):
            refuse(name, found, f"{shown(was)}, as in {step}")
        if in_launcher():
            say(f"{name}: found {found}, and {was} in {step}")


def _tell_of_another_tokenizer(args: Any, saved: dict[str, Any], step: Path) -> None:
    """Prints a line if both tokenizers' files are there and differ. GPT-NeoX compares no more than
    the sizes of the vocabularies, rounded up."""
    files = [Path(file) for file in (args.vocab_file, saved.get("vocab_file")) if file]
    if len(files) == 2 and all(file.is_file() for file in files):
        if files[0].read_bytes() != files[1].read_bytes():
            say(
                f"vocab_file: found {files[0]}, and {files[1]} in {step}, which is another "
                "tokenizer: the model knows its tokens by the numbers that the latter gives them"
            )


def _facts(settings: Any) -> dict[str, Any]:
    """Returns what describes a model, by the names of GPT-NeoX's settings. The spelling of a value,
    such as the shorthand of `attention_config`, does not matter."""
    model = from_neox(settings)
    types = model.layer_types or (METALA,) * model.num_layers
    facts = {
        # The two softmax types have the same tensors and compute the same.
        "attention_config": [SOFTMAX_TYPES[0] if t in SOFTMAX_TYPES else t for t in types],
        "intermediate_size": model.intermediate_size,
        "norm": model.norm,
        NORM_EPSILON[model.norm]: model.norm_eps,
        "no_weight_tying": not model.tied,
        "pos_emb": settings.pos_emb,
        **{f"metala.{name}": value for name, value in model.metala.of_model().items()},
    }
    if model.attention:
        names = {item.name: item.metadata["neox"] for item in fields(model.attention)}
        names["intermediate_size"] = "mlp_multiple_of"
        facts |= {name: getattr(model.attention, key) for key, name in names.items()}
        facts["use_qk_layernorm"] = settings.use_qk_layernorm
        if settings.pos_emb != "rotary":
            del facts["rotary_pct"]  # which nothing reads then
    return facts


def tell_of_other_data(args: Any, saved: dict[str, Any], file: Path) -> None:
    """Prints a line for each changed setting that makes a run read other samples than it would have
    read next."""
    for name in OF_DATA:
        default = getattr(type(args), name, None)
        before, found = saved.get(name, default), getattr(args, name)
        if before is None and name == "train_data_weights" and len(set(found or ())) == 1:
            continue  # GPT-NeoX fills in equal ones
        if before != found:
            say(
                f"{name}: found {found}, and {before} in {file}: the run goes on among "
                "other samples, and may have read some of their tokens"
            )
    before, found = saved.get("train_iters"), args.train_iters
    if before and found and before != found:
        say(
            f"train_iters: found {found}, and {before} in {file}: if this changes how often the "
            "data are read, the samples have another order from here on, since GPT-NeoX shuffles "
            "all passes together"
        )
