"""Checks of fine-tuning on labelled documents and of preference training (`train_impl: dpo`, `kto`
and `rm`), before any rank exists, and which checkpoint is the reference model's.

What GPT-NeoX can train is repaired in `upstream_fixes/preferences.py` and `upstream_fixes/data.py`.
What it would compute wrongly, or end in a traceback, is refused here in one line.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from megatron_patch.architecture import refuse
from megatron_patch.neox.token_groups import context_size, is_sequence_parallel
from megatron_patch.neox.yaml_config import merge_yaml_texts

PARTS = ("train", "valid", "test")
PAIRWISE = ("dpo", "rm")


def check_post_training(args: Any, program: str) -> None:
    """Checks the data sets and the objective of a run. Raises a SettingsError."""
    kind = args.train_impl
    if kind == "reinforce":
        wanted = "normal, dpo, kto or rm: GPT-NeoX's REINFORCE needs a server of samples"
        refuse("train_impl", kind, wanted)
    if program != "train.py":
        if kind == "rm":
            refuse("train_impl", kind, f"normal in {program}: a reward model has no words to say")
        args.train_impl = "normal"  # no reference model beside the one that generates
        return
    dataset = "pairwise" if kind in PAIRWISE else "gpt2"
    if args.dataset_impl != dataset:
        refuse("dataset_impl", args.dataset_impl, f"{dataset} with train_impl: {kind}")
    if found := args.precompute_model_name:
        refuse("precompute_model_name", found, "none: the reference model runs beside the other")
    for name in ("data_path",) if kind in PAIRWISE else ("pos_train_data_paths",):
        if found := getattr(args, name):
            refuse(name, found, f"none with train_impl: {kind}")
    if kind != "normal":
        _check_layout(args, kind)
        _check_objective(args, kind)
    _check_labels(args, kind)


def needs_reference(args: Any) -> bool:
    """Returns whether a run compares its model with a reference model."""
    return args.train_impl == "kto" or (args.train_impl == "dpo" and not args.dpo_reference_free)


def reference_args(args: Any) -> Any:
    """Returns the settings by which the reference model is loaded: the `load` and `iteration` of
    the YAML files. The run itself may go on from its own `save` instead (`go_on_from_save`)."""
    given = _as_written(args)
    reference = copy.copy(args)
    reference.load, reference.iteration = given.get("load"), given.get("iteration")
    reference.finetune = True
    return reference


def check_micro_batch(args: Any) -> None:
    """Checks the samples of a micro-batch, which GPT-NeoX has derived. Raises a SettingsError."""
    samples, kind = args.train_micro_batch_size_per_gpu, args.train_impl
    if kind == "rm" and samples < 2:
        wanted = "at least 2 with train_impl: rm: GPT-NeoX drops the dimension of a single sample"
        refuse("train_micro_batch_size_per_gpu", samples, wanted)
    if kind == "kto" and samples % 2:
        wanted = "an even number with train_impl: kto, which compares two halves"
        refuse("train_micro_batch_size_per_gpu", samples, wanted)


def _as_written(args: Any) -> dict[str, Any]:
    """Returns the settings of the YAML files; all settings where they come from no file."""
    return merge_yaml_texts(args.config_files) if args.config_files else vars(args)


def _check_layout(args: Any, kind: str) -> None:
    if (size := context_size(args)) > 1:
        wanted = f"1 with train_impl: {kind}, whose loss adds up whole sequences"
        refuse("metala.context_parallel_size", size, wanted)
    if (stages := args.pipe_parallel_size) > 0:
        refuse("pipe_parallel_size", stages, f"0 with train_impl: {kind}: GPT-NeoX has no other")
    if is_sequence_parallel(args):
        refuse("sequence_parallel", True, f"false with train_impl: {kind}")
    if (args.zero_optimization or {}).get("stage") == 3:
        refuse("zero_optimization.stage", 3, f"0, 1 or 2 with train_impl: {kind}")
    if args.eval_tasks and kind == "rm":
        refuse("eval_tasks", args.eval_tasks, "none with train_impl: rm, which makes no words")


def _check_objective(args: Any, kind: str) -> None:
    if needs_reference(args):
        given = _as_written(args)
        load, save = given.get("load"), given.get("save")
        if not (load and given.get("finetune")):
            wanted = f"true, and in load the checkpoint that is the reference of train_impl: {kind}"
            refuse("finetune", args.finetune, wanted)
        if save and Path(load).resolve() == Path(save).resolve():
            refuse("save", save, "another folder than load, which keeps the reference model")
    if kind == "rm" and not args.no_weight_tying:
        refuse("no_weight_tying", False, "true with train_impl: rm, whose head gives one number")
    if kind == "rm" and args.eod_mask_loss:
        wanted = "false with train_impl: rm, which reads the reward at the end of a document"
        refuse("eod_mask_loss", True, wanted)
    if kind == "kto" and (desirable := args.kto_desirable_weight) != args.kto_undesirable_weight:
        wanted = f"kto_desirable_weight = {desirable}: GPT-NeoX mixes up the samples' weights"
        refuse("kto_undesirable_weight", args.kto_undesirable_weight, wanted)


def _check_labels(args: Any, kind: str) -> None:
    """Checks that the data sets have what samples are made of: labels wherever documents are
    padded, and for KTO rewards."""
    packing, epochs = args.pack_impl, args.train_epochs
    if kind != "normal" and packing != "unpacked":
        refuse("pack_impl", packing, f"unpacked with train_impl: {kind}: a sample is one document")
    if epochs and packing != "packed":
        refuse("train_epochs", epochs, f"none with pack_impl: {packing}, but train_iters")
    # GPT-NeoX pads with token 0. Without labels nothing but `eod_mask_loss` leaves it out of the
    # loss, if 0 is the end-of-document token, which the ranks check (`upstream_fixes/data.py`).
    needs_labels = packing == "unpacked" or (packing != "packed" and not args.eod_mask_loss)
    for sign in ("pos_", "neg_") if kind in PAIRWISE else ("",):
        has_labels = bool(getattr(args, f"{sign}train_label_data_paths"))
        for part in PARTS:
            name = f"{sign}{part}_data_paths"
            paths = getattr(args, name) or []
            if kind != "normal" and not paths:
                refuse(name, None, f"data sets with train_impl: {kind}")
            labels = getattr(args, f"{sign}{part}_label_data_paths") or []
            if labels and not has_labels:
                wanted = f"none without {sign}train_label_data_paths"
                refuse(f"{sign}{part}_label_data_paths", labels, wanted)
            if (needs_labels or has_labels) and len(labels) != max(len(paths), 1):
                wanted = f"as many as {name}"
                if not has_labels:
                    wanted += f": with pack_impl: {packing} padding would count in the loss"
                refuse(f"{sign}{part}_label_data_paths", labels or None, wanted)
            rewards = getattr(args, f"{part}_reward_data_paths") or []
            if len(rewards) != (len(paths) if kind == "kto" else 0):
                wanted = f"as many as {name}" if kind == "kto" else "none without train_impl: kto"
                refuse(f"{part}_reward_data_paths", rewards or None, wanted)
