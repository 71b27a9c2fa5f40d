"""Checks of fine-tuning on labelled documents and of preference training (`train_impl: dpo`, `kto`
and `rm`), before any rank exists, and which checkpoint is the reference model's.

What GPT-NeoX can train is repaired in `upstream_fixes/preferences.py` and `upstream_fixes/data.py`.
What it would compute wrongly, or end in a traceback, is refused here in one line.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron_patch.architecture import MetaLAOptions, refuse
from megatron_patch.neox.yaml_config import merge_yaml_texts

PARTS = ("train", "valid", "test")
PAIRWISE = ("dpo", "rm")


def check_post_training(args: Any, program: str) -> None:
    """Checks the data sets and the objective of a run. Raises a SettingsError, one line that names
    the setting, what was found and what was wanted."""
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
    given = merge_yaml_texts(args.config_files) if args.config_files else vars(args)
    reference = copy.copy(args)
    reference.load, reference.iteration = given.get("load"), given.get("iteration")
    reference.finetune = True
    return reference


def check_micro_batch(args: Any) -> None:
    """Checks the samples of a micro-batch, which GPT-NeoX has derived. Raises a SettingsError."""
    samples, kind = args.train_micro_batch_size_per_gpu, args.train_impl
    if kind == "rm" and samples < 2:
        refuse("train_micro_batch_size_per_gpu", samples, "at least 2 with train_impl: rm")
    if kind == "kto" and samples % 2:
        wanted = "an even number with train_impl: kto, which compares two halves"
        refuse("train_micro_batch_size_per_gpu", samples, wanted)


def _check_layout(args: Any, kind: str) -> None:
    size = MetaLAOptions.parse(args.metala).context_parallel_size
    if size > 1:
        wanted = f"1 with train_impl: {kind}, which adds up whole sequences"
        refuse("metala.context_parallel_size", size, wanted)
    if (stages := args.pipe_parallel_size) > 0:
        refuse("pipe_parallel_size", stages, f"0 with train_impl: {kind}: GPT-NeoX has no other")
    if args.sequence_parallel and args.model_parallel_size > 1:
        refuse("sequence_parallel", True, f"false with train_impl: {kind}")
    if (args.zero_optimization or {}).get("stage") == 3:
        wanted = f"0, 1 or 2 with train_impl: {kind}: it also holds models that do not train"
        refuse("zero_optimization.stage", 3, wanted)
    if args.eval_tasks and kind == "rm":
        refuse("eval_tasks", args.eval_tasks, "none with train_impl: rm, which makes no words")


def _check_objective(args: Any, kind: str) -> None:
    if found := args.precompute_model_name:
        wanted = f"none with train_impl: {kind}: the reference model runs beside"
        refuse("precompute_model_name", found, wanted)
    if needs_reference(args) and not _has_reference(args):
        wanted = f"true and load: the reference model of train_impl: {kind}"
        refuse("finetune", args.finetune, wanted)
    if kind == "rm" and not args.no_weight_tying:
        refuse("no_weight_tying", False, "true with train_impl: rm, whose head gives one number")
    if kind == "rm" and args.eod_mask_loss:
        wanted = "false with train_impl: rm, which reads the reward at the end of a document"
        refuse("eod_mask_loss", True, wanted)
    if kind == "kto" and (desirable := args.kto_desirable_weight) != args.kto_undesirable_weight:
        wanted = f"kto_desirable_weight = {desirable}: GPT-NeoX mixes up the samples' weights"
        refuse("kto_undesirable_weight", args.kto_undesirable_weight, wanted)


def _has_reference(args: Any) -> bool:
    """Returns whether a run starts from `load` as it is, so that it can be the reference model. In
    a run that goes on from `save`, the YAML files say so."""
    given = merge_yaml_texts(args.config_files) if args.config_files else vars(args)
    return bool(given.get("load") and given.get("finetune"))


def _check_labels(args: Any, kind: str) -> None:
    """Checks that each data set has what its samples are made of: labels wherever documents are
    padded, and for KTO rewards."""
    signs = ("pos_", "neg_") if kind in PAIRWISE else ("",)
    needs_labels = kind != "normal" or args.pack_impl != "packed"
    if kind in PAIRWISE and args.pack_impl != "unpacked":
        refuse("pack_impl", args.pack_impl, f"unpacked with train_impl: {kind}: a sample is a pair")
    if kind == "kto" and args.pack_impl != "unpacked":
        refuse("pack_impl", args.pack_impl, "unpacked with train_impl: kto: a sample has a reward")
    if args.train_epochs and args.pack_impl != "packed":
        wanted = f"none with pack_impl: {args.pack_impl}, but train_iters"
        refuse("train_epochs", args.train_epochs, wanted)
    for sign in signs:
        first = args.__dict__[f"{sign}train_label_data_paths"]
        for part in PARTS:
            paths = getattr(args, f"{sign}{part}_data_paths") or []
            if kind != "normal" and not paths:
                wanted = f"data sets with train_impl: {kind}"
                refuse(f"{sign}{part}_data_paths", None, wanted)
            labels = getattr(args, f"{sign}{part}_label_data_paths")
            if (needs_labels or first) and len(labels or []) != max(len(paths), 1):
                why = "the others have labels" if first else "padding would count in the loss"
                wanted = f"as many as {sign}{part}_data_paths: {why}"
                refuse(f"{sign}{part}_label_data_paths", labels, wanted)
            if labels and not (first and needs_labels or first):
                wanted = f"none without {sign}train_label_data_paths, by which GPT-NeoX reads them"
                refuse(f"{sign}{part}_label_data_paths", labels, wanted)
            if kind == "kto":
                rewards = args.__dict__[f"{part}_reward_data_paths"]
                if len(rewards or []) != len(paths):
                    wanted = f"as many as {part}_data_paths with train_impl: kto"
                    refuse(f"{part}_reward_data_paths", rewards, wanted)
