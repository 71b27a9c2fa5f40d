"""A run that was meant to go on from a checkpoint must not silently start anew, nor end in what
DeepSpeed says of files that it does not expect."""

from __future__ import annotations

import math
import os
from pathlib import Path

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.checkpoint_files import check_files
from megatron_patch.neox.run_checks import program
from megatron_patch.neox.yaml_config import SUFFIXES, merge_yaml_texts, read_yaml
from megatron_patch.steps import latest_step, saved_steps
from megatron_patch.torch_file import UnreadableFile, load_safely


def go_on_from_save(args) -> None:
    """Lets a run that was stopped go on from its own last checkpoint.

    A run whose start is elsewhere than in `save` (`finetune: true`, a `load` of another folder, or
    none) would begin there again each time it is started, and write over its checkpoints. Where
    `save` holds steps of this very run, they are what it loads.

    Args:
        args: GPT-NeoX's settings in the launcher, which hands them to all ranks.

    Raises:
        SettingsError: `save` holds steps that began elsewhere.
    """
    if not _is_training(args) or not args.save or not _saved("save", Path(args.save)):
        return
    if not args.finetune and args.load and _is_same(args.load, args.save):
        return
    step = _latest_step("save", Path(args.save))
    configs = [f for f in sorted((step / "configs").glob("*")) if f.suffix in SUFFIXES]
    saved = merge_yaml_texts(read_yaml(configs), in_order=False)
    own = merge_yaml_texts(args.config_files or {})
    for name, default in {"load": None, "finetune": False, "iteration": None}.items():
        before, now = saved.get(name, default), own.get(name, default)
        if before != now and not (name == "load" and before and now and _is_same(before, now)):
            raise SettingsError(
                f"save: found {step}, of a run with {name}: {before}, where this one has {now}; "
                f"wanted a folder of its own, or load: {args.save} and finetune: false to go on"
            )
    args.load, args.finetune, args.iteration = args.save, False, None
    print(f"MetaLA: save holds {step.name} of this run, which goes on from there", flush=True)


def _is_training(args) -> bool:
    return program(args) == "train.py"


def _is_same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def check_load(args) -> None:
    """Checks that the checkpoint a run asks for by `load` is there, and can be loaded as the
    settings say.

    GPT-NeoX prints a line and trains from scratch where it is not there. Only one case is a first
    start and not a mistake: `load` and `save` name the same folder and it holds no checkpoint yet,
    the usual way to have one command that starts and resumes.

    Raises:
        SettingsError: names the folder or setting, what was found there and what was wanted.
    """
    is_training = _is_training(args)
    if is_training and args.no_load_optim:
        raise SettingsError(
            "no_load_optim: found true, wanted false: GPT-NeoX would train one of the model's "
            "tensors alone; finetune: true starts from the weights of a checkpoint"
        )
    if args.load is None:
        return
    step = _find_step(args)
    if step is not None:
        _check_states(args, step, is_training)


def _find_step(args) -> Path | None:
    """The `global_stepN` folder, `None` at a first start."""
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
    """The names of the iterations' folders."""
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
    """By the first rank's file, which is read without running what is in it: whether its layout is
    that of the settings, and whether it has all that will be loaded, the files of other ranks too.
    GPT-NeoX ends with exit code 0 where it misses the random states."""
    if os.environ.get("RANK", "0") != "0":
        return
    if any((args.checkpoint or {}).get(f) for f in ("load_universal", "use_node_local_storage")):
        return  # other files, or on each node its own
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

    def refuse(setting: str, found: object, wanted: object) -> None:
        raise SettingsError(f"{setting}: found {found!r}, wanted {wanted}")

    if not is_training and file is partitioned:
        refuse("load", args.load, "a checkpoint in one file a rank, not one of ZeRO 3")
    if (stage == 3) != (file is partitioned):
        # They have other files: DeepSpeed finds none that it could load.
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
    for name, saved in saved_args.items():  # GPT-NeoX asserts that they are equal
        if (found := getattr(args, name, None)) is not None and found != saved:
            refuse(name, found, f"{saved!r}, as in {file}")
    if not args.finetune:
        _check_run(args, states, file, is_training, stage, refuse)
    if "metala" in (args.attention_config or ()):
        data_ranks = _count(states.get("dp_world_size"))
        check_files(args, step, stage, model_ranks, data_ranks)


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 < value < 1_000_000 else None


def _check_run(args, states: dict, file: Path, is_training: bool, stage: int, refuse) -> None:
    """What a run needs besides the weights to go on."""
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
    _check_optimizer(args, states, file, stage, refuse)
    if isinstance(states["lr_scheduler"], dict):
        _check_schedule(args, states["lr_scheduler"], file)


def _check_optimizer(args, states: dict, file: Path, stage: int, refuse) -> None:
    """Under ZeRO the optimizer is in files of its own, a share for each data-parallel rank, whose
    names tell bfloat16. ZeRO 1 and 2 read each other's."""
    or_else = f"as in {file}, or finetune: true, which loads the weights alone"
    optimizer = states.get("optimizer")
    if not stage:
        if not isinstance(optimizer, dict):
            saved = _mapping(_mapping(states.get("ds_config")).get("zero_optimization"))
            refuse("zero_optimization.stage", 0, f"{saved.get('stage', '1 or 2')}, {or_else}")
        is_float32 = "param_groups" in optimizer  # else DeepSpeed wraps it
        if is_float32 != (args.precision == "fp32"):
            wanted = "fp32" if is_float32 else "another one"
            refuse("precision", args.precision, f"{wanted}, {or_else}")
        return
    is_bfloat16 = args.precision == "bfloat16"
    prefixes = ("bf16_", "") if is_bfloat16 else ("", "bf16_")
    own, other = (file.with_name(f"{p}zero_pp_rank_0_mp_rank_00_optim_states.pt") for p in prefixes)
    if not own.is_file():
        if other.is_file():
            wanted = "another one" if is_bfloat16 else "bfloat16"
            refuse("precision", args.precision, f"{wanted}, {or_else}")
        if optimizer is not None:  # else ZeRO's file is missing
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
    """GPT-NeoX asserts on every rank that the learning rate's schedule is the checkpoint's, unless
    it is told which of the two to take."""
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
    values = {  # by the scheduler's name: setting, value
        "start_lr": ("optimizer.params.lr", args.lr),
        "min_lr": ("min_lr", args.min_lr),
        "decay_style": ("lr_decay_style", args.lr_decay_style),
    }
    if steps is not None:  # with `train_epochs` the data tell
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
