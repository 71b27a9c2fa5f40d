"""Checks of the checkpoint that a run loads, before any rank exists.

GPT-NeoX prints a line and trains from scratch where it finds no checkpoint. Where files are missing
or belong to another layout, it and DeepSpeed end in tracebacks that name no file.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_patch.architecture import METALA, SettingsError, refuse
from megatron_patch.architecture_neox import module_layers
from megatron_patch.neox.loaded_model import check_model, tell_of_other_data
from megatron_patch.neox.notices import say
from megatron_patch.neox.patching import in_metala_runs, repairs
from megatron_patch.neox.post_training import needs_reference, reference_args
from megatron_patch.neox.run_settings import program
from megatron_patch.neox.this_process import in_launcher
from megatron_patch.neox.upstream_fixes.cpu_mode import runs_on_cpu
from megatron_patch.neox.yaml_config import SUFFIXES, merge_yaml_texts, read_yaml
from megatron_patch.steps import latest_step, saved_steps
from megatron_patch.torch_file import UnreadableFile, load_safely

_WEIGHT_DECAY = 0.1  # GPT-NeoX's default
# The optimizers' defaults, by what their type ends in.
_DEFAULTS = {"adam": {"betas": [0.9, 0.999], "eps": 1e-8}, "lion": {"betas": [0.9, 0.99]}}


def go_on_from_save(args) -> None:
    """Lets a stopped run go on from its own last checkpoint. The launcher calls this.

    A run that does not load from `save` (because of `finetune: true`, a `load` of another folder,
    or none) would begin again each time it is started, and write over its checkpoints. If `save`
    holds steps of this very run, this changes the settings so that it loads the last of them.
    Raises a SettingsError if `save` holds steps of a run that began elsewhere.
    """
    if program(args) != "train.py" or not args.save or not _saved("save", Path(args.save)):
        return
    if not args.finetune and args.load and _is_same(args.load, args.save):
        return
    step = _latest_step("save", Path(args.save))
    saved = _saved_settings(step)
    own = merge_yaml_texts(args.config_files or {})
    for name, default in {"load": None, "finetune": False, "iteration": None}.items():
        before, now = saved.get(name, default), own.get(name, default)
        if before != now and not (name == "load" and before and now and _is_same(before, now)):
            raise SettingsError(
                f"save: found {step}, of a run with {name}: {before}, where this one has {now}; "
                f"wanted a folder of its own, or load: {args.save} and finetune: false to go on"
            )
    args.load, args.finetune, args.iteration = args.save, False, None
    say(f"save holds {step.name} of this run, which goes on from there")


def _saved_settings(step: Path) -> dict[str, Any]:
    """Returns the settings in a checkpoint's YAML files."""
    configs = [f for f in sorted((step / "configs").glob("*")) if f.suffix in SUFFIXES]
    return merge_yaml_texts(read_yaml(configs), in_order=False)


def _is_same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def check_load(args) -> None:
    """Checks that the checkpoint of `load` exists and can be loaded as the settings say.

    One case without a checkpoint is a first start and no mistake: `load` and `save` name the same
    folder, and it holds no checkpoint yet. That is the usual way to have one command that starts
    and resumes. Raises a SettingsError.
    """
    is_training = program(args) == "train.py"
    if is_training and args.no_load_optim:
        raise SettingsError(
            "no_load_optim: found true, wanted false: GPT-NeoX would train one of the model's "
            "tensors alone; finetune: true starts from the weights of a checkpoint"
        )
    if is_training and METALA in (args.attention_config or ()) and needs_reference(args):
        reference = reference_args(args)
        _check_states(reference, _find_step(reference), is_training)
    if args.load is None:
        _check_unloaded(args)
        return
    step = _find_step(args)
    if step is not None:
        _check_states(args, step, is_training)


def _check_unloaded(args) -> None:
    """Refuses what has no meaning without `load`: GPT-NeoX would train from scratch."""
    if METALA not in (args.attention_config or ()):
        return
    if (name := program(args)) in ("generate.py", "eval.py"):
        refuse("load", None, f"a folder of checkpoints, from which {name} takes its model")
    for name in ("finetune", "iteration"):
        if found := getattr(args, name):
            refuse(name, found, f"{'false' if name == 'finetune' else 'none'} without load")


def _find_step(args) -> Path | None:
    """Returns the `global_stepN` folder, `None` at a first start."""
    folder = Path(args.load)
    saved = _saved("load", folder)
    if args.iteration is not None:
        wanted = f"global_step{args.iteration}"
        if wanted not in saved:
            raise SettingsError(
                f"load: found {saved or 'no checkpoint'} in {folder}, wanted {wanted}"
            )
        return folder / wanted
    if saved or os.path.lexists(folder / "latest"):
        return _latest_step("load", folder)
    same_folder = args.save is not None and _is_same(args.save, args.load)
    if args.finetune or args.no_load_optim or not same_folder:
        raise SettingsError(f"load: found no checkpoint in {folder}, wanted one to go on from")
    return None


def _saved(setting: str, folder: Path) -> list[str]:
    """Returns the names of the folders `global_stepN`."""
    try:
        return [f"global_step{step}" for step in saved_steps(folder)]
    except ValueError as error:
        raise SettingsError(f"{setting}: {error}") from None


def _latest_step(setting: str, folder: Path) -> Path:
    saved = _saved(setting, folder)
    if not (folder / "latest").is_file():
        raise SettingsError(
            f"{setting}: found {saved} in {folder}, wanted a file `latest` naming one"
        )
    try:
        return latest_step(folder)
    except ValueError as error:
        raise SettingsError(f"{setting}: {error}; found {saved}") from None


def _check_states(args, step: Path, is_training: bool) -> None:
    """Checks the layout of a checkpoint and that everything that will be loaded exists, including
    the files of other ranks. It reads the first rank's file without running code from it."""
    if os.environ.get("RANK", "0") != "0":
        return
    if any((args.checkpoint or {}).get(f) for f in ("load_universal", "use_node_local_storage")):
        return  # the files have other names, or each node has its own
    # GPT-NeoX generates and evaluates without ZeRO, whatever the settings say.
    stage = (args.zero_optimization or {}).get("stage", 0) if is_training else 0
    whole, partitioned = (step / f"{p}mp_rank_00_model_states.pt" for p in ("", "zero_pp_rank_0_"))
    file = whole if whole.is_file() else partitioned
    try:
        states = load_safely(file if file.is_file() else whole)
    except UnreadableFile as error:
        raise SettingsError(f"load: {error}") from None
    if not isinstance(states, dict):
        raise SettingsError(f"load: {file}: found a {type(states).__name__}, wanted states by name")

    if not is_training and file is partitioned:
        refuse("load", args.load, "a checkpoint in one file a rank, not one of ZeRO 3")
    if (stage == 3) != (file is partitioned):
        # ZeRO 3 has files of other names: DeepSpeed would find none that it can load.
        wanted = "another one" if stage == 3 else "3"
        refuse("zero_optimization.stage", stage, f"{wanted}, as in {file}")
    another = f"as in {file}, or that checkpoint in another layout, by convert/reshape_neox.py"
    if file is whole and (states.get("module") is None) != (args.pipe_parallel_size > 0):
        wanted = "at least 1" if states.get("module") is None else "0"
        refuse("pipe_parallel_size", args.pipe_parallel_size, f"{wanted}, {another}")
    saved_args = _mapping(states.get("args"))
    saved = saved_args.get("model_parallel_size", args.model_parallel_size)
    if saved != args.model_parallel_size:
        refuse("model_parallel_size", args.model_parallel_size, f"{saved}, {another}")
    model_ranks = _count(states.get("mp_world_size"))
    stages = model_ranks and model_ranks // max(args.model_parallel_size, 1)
    if file is whole and not args.finetune and is_training and args.pipe_parallel_size:
        if stages not in (None, args.pipe_parallel_size):
            refuse("pipe_parallel_size", args.pipe_parallel_size, f"{stages}, {another}")
    if METALA in (args.attention_config or ()):
        saved_args = args_to_compare(args, saved_args)
    for name, saved in saved_args.items():  # GPT-NeoX asserts that they are equal
        if (found := getattr(args, name, None)) is not None and found != saved:
            refuse(name, found, f"{saved!r}, as in {file}")
    saved_settings = _saved_settings(step)
    of_metala = METALA in str(saved_settings.get("attention_config"))
    if of_metala and METALA in (args.attention_config or ()):
        check_model(args, saved_settings, step, is_training)
    if not args.finetune:
        _check_going_on(args, states, saved_settings, file, is_training, stage)
    if METALA in (args.attention_config or ()):
        data_ranks = _count(states.get("dp_world_size"))
        _check_files(args, step, stage, model_ranks, data_ranks)


def args_to_compare(args, saved: dict[str, Any]) -> dict[str, Any]:
    """Returns those of a checkpoint's sizes that this model must have too. Only learned positions
    have a row for each of `max_position_embeddings`."""
    free = () if args.pos_emb == "learned" else ("max_position_embeddings",)
    return {name: value for name, value in saved.items() if name not in free}


# megatron/checkpointing.py:58
@repairs(
    "sequences of other lengths",
    "megatron.checkpointing:check_checkpoint_args",
    "in checkpoint_args.items()",
)
def load_for_other_lengths() -> None:
    """Lets a model without learned positions load a checkpoint for longer sequences than before.
    GPT-NeoX wants the `max_position_embeddings` of the checkpoint and sequences within it."""
    from megatron.checkpointing import check_checkpoint_args

    @in_metala_runs(check_checkpoint_args)
    def check_sizes(check_checkpoint_args, neox_args, checkpoint_args):
        check_checkpoint_args(neox_args, args_to_compare(neox_args, checkpoint_args))


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 < value < 1_000_000 else None


def _check_going_on(
    args, states: dict, saved: dict, file: Path, is_training: bool, stage: int
) -> None:
    """Checks what a run needs besides the weights to go on. Without the random states GPT-NeoX
    ends with exit code 0."""
    random_states = args.no_load_rng or "random_rng_state" in states
    if is_training and states.get("lr_scheduler") is None:
        missing = "no optimizer states" if random_states else "no optimizer and no random states"
        refuse("finetune", args.finetune, f"True: {file} has {missing}")
    if not random_states:
        refuse(
            "no_load_rng",
            args.no_load_rng,
            f"True, which loads all else: {file} has no random states (no_save_rng)",
        )
    if not is_training:
        return
    _check_optimizer(args, states, file, stage)
    if isinstance(states["lr_scheduler"], dict):
        _check_schedule(args, states["lr_scheduler"], file)
    if saved:
        _check_hyperparameters(args, saved, file)
    done = _count(states.get("iteration")) or 0
    if args.train_iters and done > args.train_iters:
        wanted = f"at least {done}, the iterations that {file} has behind it"
        refuse("train_iters", args.train_iters, wanted)
    if in_launcher():  # which tells it once
        if done and done == args.train_iters:
            say(f"train_iters: {file} has all {done} iterations behind it, so nothing is trained")
        _tell_of_another_batch(args, states, saved, file)
        if saved:
            tell_of_other_data(args, saved, file)


def _check_hyperparameters(args, saved: dict, file: Path) -> None:
    """Checks betas, eps and weight decay. PyTorch takes them from the optimizer's states, which it
    loads, whatever the settings say."""
    or_else = f"as in {file}, whose optimizer goes on, or finetune: true, which makes a new one"
    before, now = (
        _mapping(_mapping(o).get("params")) for o in (saved.get("optimizer"), args.optimizer)
    )
    old, kind = (str(_mapping(o).get("type")) for o in (saved.get("optimizer"), args.optimizer))
    family = [end for end in _DEFAULTS if kind.lower().endswith(end)]
    if not old.lower().endswith(tuple(family or [kind.lower()])):
        refuse("optimizer.type", kind, f"{old}, {or_else}")
    defaults = _DEFAULTS[family[0]] if family else {}
    for name in ("betas", "eps"):
        was, found = (params.get(name, defaults.get(name)) for params in (before, now))
        if was != found:
            refuse(f"optimizer.params.{name}", found, f"{was}, {or_else}")
    decay = saved.get("weight_decay", _WEIGHT_DECAY)
    if args.weight_decay != decay:
        refuse("weight_decay", args.weight_decay, f"{decay}, {or_else}")


def _tell_of_another_batch(args, states: dict, saved_settings: dict, file: Path) -> None:
    """Prints a line if a batch has another number of samples than before: GPT-NeoX goes on in the
    data at the iteration times today's batch, and so leaves samples out, or reads some again."""
    saved = _count(_mapping(states.get("ds_config")).get("train_batch_size"))
    step = _count(states.get("iteration"))
    if not saved or not step:
        return
    # DeepSpeed is told a batch of as many times the samples (`context_parallel.py`).
    options = _mapping(saved_settings.get(METALA))
    saved //= _count(options.get("context_parallel_size")) or 1
    if (found := args.train_batch_size) != saved:
        say(
            f"train_batch_size: found {found}, and {saved} in {file}: the run goes on at sample "
            f"{step * found:,} of its data, not at {step * saved:,}, where it had stopped"
        )


def _check_optimizer(args, states: dict, file: Path, stage: int) -> None:
    """Checks that the optimizer's states fit ZeRO stage, precision and number of ranks.

    ZeRO keeps them in files of their own, one for each data-parallel rank, and marks bfloat16 in
    their names. ZeRO 1 and 2 can read each other's.
    """
    or_else = f"as in {file}, or finetune: true, which loads the weights alone"
    optimizer = states.get("optimizer")
    if not stage:
        if not isinstance(optimizer, dict):
            saved = _mapping(_mapping(states.get("ds_config")).get("zero_optimization"))
            refuse("zero_optimization.stage", 0, f"{saved.get('stage', '1 or 2')}, {or_else}")
        is_float32 = "param_groups" in optimizer  # 16-bit optimizers of DeepSpeed wrap it
        if is_float32 != (args.precision == "fp32"):
            wanted = "fp32" if is_float32 else "another one"
            refuse("precision", args.precision, f"{wanted}, {or_else}")
        kind = str(_mapping(args.optimizer).get("type")).lower()
        is_flat = kind == "adam" or (runs_on_cpu(args) and kind in ("cpu_adam", "cpu_torch_adam"))
        if "fp32_groups" in optimizer and is_flat:
            raise SettingsError(
                f"load: found float32 weights tensor by tensor in {file}, as an earlier version of "
                "the plugin saved them, wanted flat ones, or finetune: true, which needs none"
            )
        return
    is_bfloat16 = args.precision == "bfloat16"
    prefixes = ("bf16_", "") if is_bfloat16 else ("", "bf16_")
    own, other = (file.with_name(f"{p}zero_pp_rank_0_mp_rank_00_optim_states.pt") for p in prefixes)
    if not own.is_file():
        if other.is_file():
            wanted = "another one" if is_bfloat16 else "bfloat16"
            refuse("precision", args.precision, f"{wanted}, {or_else}")
        if optimizer is not None:  # otherwise a file of ZeRO is missing, which `_check_files` names
            refuse("zero_optimization.stage", stage, f"0, {or_else}")
    saved = _count(states.get("dp_world_size"))
    ranks = max(args.model_parallel_size, 1) * max(args.pipe_parallel_size, 1)
    if saved and args.global_num_gpus and args.global_num_gpus != saved * ranks:
        refuse(
            "global_num_gpus",
            args.global_num_gpus,
            f"{saved * ranks}, since ZeRO has a share of the optimizer for each, {or_else}",
        )


def _check_schedule(args, saved: dict, file: Path) -> None:
    """Checks that the learning rate's schedule is the checkpoint's, which GPT-NeoX asserts on every
    rank unless a setting says which of the two to take."""
    if args.override_lr_scheduler and args.use_checkpoint_lr_scheduler:
        raise SettingsError(
            "use_checkpoint_lr_scheduler: found true, wanted false with override_lr_scheduler: true"
        )
    if args.override_lr_scheduler or args.use_checkpoint_lr_scheduler:
        return
    steps = args.lr_decay_iters
    if steps is None and args.train_iters is not None:
        fraction = args.lr_decay_fraction
        steps = args.train_iters if fraction is None else math.floor(args.train_iters * fraction)
    values = {  # the scheduler's name: (setting, value)
        "start_lr": ("optimizer.params.lr", args.lr),
        "min_lr": ("min_lr", args.min_lr),
        "decay_style": ("lr_decay_style", args.lr_decay_style),
    }
    if steps is not None:  # with `train_epochs` the data decide
        setting = "train_iters" if args.lr_decay_iters is None else "lr_decay_iters"
        values["end_iter"] = (setting, max(1, steps))
        values["warmup_iter"] = ("warmup", args.warmup * max(1, steps))
    for name, (setting, found) in values.items():
        if name in saved and found != saved[name]:
            unit = " steps" if name in ("end_iter", "warmup_iter") else ""
            raise SettingsError(
                f"{setting}: found {found}{unit}, wanted {saved[name]}{unit}, as in {file}; "
                "override_lr_scheduler: true takes the settings' schedule, "
                "use_checkpoint_lr_scheduler: true the checkpoint's"
            )


# ---- The files of all ranks


def _check_files(
    args, step: Path, stage: int, model_ranks: int | None, data_ranks: int | None
) -> None:
    """Checks that all files exist that the settings' layout needs, and that none is cut off.
    `torch.save` writes a zip file with its list of contents at the end, so no tensor is read.

    `stage` is 0 for a program that does not train. `model_ranks` and `data_ranks` wrote the
    checkpoint, `None` where it does not say. Raises a SettingsError that names the first file that
    is missing or damaged.
    """
    names = set()
    for name in _names(args, stage, model_ranks, data_ranks or 1):
        if reason := _damage(step / name):
            raise SettingsError(f"load: {step / name}: {reason}")
        names.add(name)
    # DeepSpeed counts the files of each kind, and takes one too many for another layout.
    kinds = ("mp_rank_*", "layer_*") if args.pipe_parallel_size else ("mp_rank_*",)
    for file in sorted(file for kind in kinds for file in step.glob(f"{kind}model_states.pt")):
        if stage != 3 and file.name not in names:
            raise SettingsError(f"load: {file}: a file of no rank or layer of this checkpoint")


def _names(args, stage: int, model_ranks: int | None, data_ranks: int) -> Iterator[str]:
    """Yields the names of the files that a run with these settings loads."""
    tensor_ranks = max(args.model_parallel_size, 1)
    model_ranks = model_ranks or tensor_ranks * max(args.pipe_parallel_size, 1)
    if stage == 3:
        for rank in range(data_ranks):
            yield f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
    else:
        for rank in range(model_ranks):
            yield f"mp_rank_{rank:02d}_model_states.pt"
    if args.pipe_parallel_size:
        for layer in module_layers(args.num_layers, not args.no_weight_tying):
            for rank in range(tensor_ranks):
                yield f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
    if stage == 3 or (stage and not args.finetune):
        prefix = "bf16_" if args.precision == "bfloat16" else ""
        for data_rank in range(data_ranks):
            for rank in range(model_ranks):
                yield f"{prefix}zero_pp_rank_{data_rank}_mp_rank_{rank:02d}_optim_states.pt"


def _damage(file: Path) -> str | None:
    """Returns what is wrong with a file of `torch.save`, as far as its two ends tell."""
    if not file.exists():
        return "the file is missing"
    if not file.is_file():
        return "no regular file"
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
        if start.startswith(b"\x80"):  # the format before PyTorch 1.6
            return None
        if start == b"PK\x03\x04":
            with zipfile.ZipFile(file):
                return None
    except zipfile.BadZipFile:
        pass
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "truncated or no PyTorch file"
