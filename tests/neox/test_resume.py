"""A `load` that finds no checkpoint stops the run, unless the run is a first start; what cannot be
loaded is refused in one line; a run that was stopped goes on from `save`."""

import pathlib
from types import SimpleNamespace

import pytest
import torch
import yaml

from convert.command import ConvertError
from convert.neox_reader import find_step
from megatron_patch.architecture import SettingsError
from megatron_patch.neox.loaded_model import OF_DATA
from megatron_patch.neox.upstream_fixes.resume import check_load, go_on_from_save
from tests.neox.training import settings as training_settings
from tests.neox.training import stand_in


def settings(load, **changes) -> SimpleNamespace:
    values = dict(
        save=load,
        iteration=None,
        finetune=False,
        no_load_optim=None,
        no_load_rng=False,
        checkpoint=None,
        model_parallel_size=1,
        pipe_parallel_size=0,
        user_script="./train.py",
        train_impl="normal",
        config_files={},
        zero_optimization={"stage": 0},
        precision="fp32",
        distributed_backend="gloo",
        global_num_gpus=1,
        lr=1e-3,
        min_lr=1e-4,
        warmup=0.1,
        lr_decay_style="cosine",
        lr_decay_iters=None,
        lr_decay_fraction=None,
        train_iters=20,
        attention_config=["metala"] * 2,
        num_layers=2,
        no_weight_tying=True,
        pos_emb="none",
        override_lr_scheduler=False,
        use_checkpoint_lr_scheduler=False,
        optimizer={"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
        weight_decay=0.1,
        **dict.fromkeys(OF_DATA),
    )
    return stand_in(values, load=load, **changes)


def save_step(folder, step: int, latest: bool = True) -> None:
    (folder / f"global_step{step}").mkdir(parents=True)
    torch.save(STATES, folder / f"global_step{step}/mp_rank_00_model_states.pt")
    if latest:
        (folder / "latest").write_text(f"global_step{step}")


SCHEDULE = {
    "start_lr": 1e-3,
    "min_lr": 1e-4,
    "decay_style": "cosine",
    "end_iter": 20,
    "warmup_iter": 2.0,
    "num_iters": 10,
}
STATES = {
    "module": {},
    "optimizer": {"param_groups": []},
    "lr_scheduler": SCHEDULE,
    "random_rng_state": (3, (1, 2), None),
    "args": {"model_parallel_size": 1},
}


@pytest.mark.parametrize(
    ("kind", "is_refused"), [("Adam", True), ("cpu_adam", True), ("lion", False)]
)
def test_weights_tensor_by_tensor(tmp_path, kind, is_refused):
    """An earlier version stepped PyTorch's AdamW so in bfloat16 without ZeRO; Lion still is."""
    optimizer = {"type": kind, "params": {"lr": 1e-3, "betas": [0.9, 0.95]}}
    (tmp_path / "global_step10").mkdir()
    states = {**STATES, "optimizer": {"fp32_groups": []}}
    torch.save(states, tmp_path / "global_step10/mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("global_step10")
    given = dict(precision="bfloat16", optimizer=optimizer)
    if not is_refused:
        return check_load(settings(str(tmp_path), **given))
    with pytest.raises(SettingsError, match="^load: found float32 weights tensor by tensor in "):
        check_load(settings(str(tmp_path), **given))
    check_load(settings(str(tmp_path), save=None, finetune=True, **given))


def test_a_first_start_and_a_resumption_pass(tmp_path):
    check_load(settings(None))
    folder = tmp_path / "checkpoints"
    check_load(settings(str(folder)))
    save_step(folder, 10)
    check_load(settings(str(folder)))
    check_load(settings(str(folder), save=None, finetune=True))
    check_load(settings(str(folder), iteration=10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune": True}, "finetune: found True, wanted false without load"),
        ({"iteration": 10}, "iteration: found 10, wanted none without load"),
        ({"user_script": "generate.py"}, "load: found None, wanted a folder of checkpoints, from "),
    ],
)
def test_what_needs_a_checkpoint_is_refused_without_one(changes, message):
    """GPT-NeoX would train from scratch."""
    with pytest.raises(SettingsError, match=message):
        check_load(settings(None, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"save": None},
        {"save": "elsewhere"},
        {"finetune": True},
        {"no_load_optim": True, "user_script": "./generate.py"},
    ],
)
def test_a_checkpoint_that_was_meant_must_exist(tmp_path, changes):
    with pytest.raises(SettingsError, match=f"load: found no checkpoint in {tmp_path}"):
        check_load(settings(str(tmp_path), **changes))


def test_the_reference_model_must_exist(tmp_path):
    """Also when the run itself goes on from `save`."""
    save_step(tmp_path / "save", 10)
    written = {"config_files": {"a.yml": f"{{load: {tmp_path}/base, finetune: true}}"}}
    changes = {"attention_config": ["metala"], "train_impl": "kto", "save": None, **written}
    with pytest.raises(SettingsError, match=f"load: found no checkpoint in {tmp_path}/base"):
        check_load(settings(str(tmp_path / "save"), **changes))


def test_the_asked_iteration_must_exist(tmp_path):
    save_step(tmp_path, 10)
    with pytest.raises(SettingsError, match=r"found \['global_step10'\].*wanted global_step20"):
        check_load(settings(str(tmp_path), iteration=20))


def test_checkpoints_without_latest_do_not_start_anew(tmp_path):
    save_step(tmp_path, 10, latest=False)
    with pytest.raises(SettingsError, match=r"found \['global_step10'\].*wanted a file `latest`"):
        check_load(settings(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b"global_step20", "global_step20"),
        (b"", ""),
        (b".", r"\."),
        (b"..", r"\.\."),
        (b"global_step10/../global_step10", "global_step10/"),
        (b"../../outside", r"\.\./\.\./outside"),
        (b"global_step010", "global_step010"),
        (b"global_step\xff10", r"global_step"),
        (b"global_step10\0", "global_step10"),
        (b"/", "/"),
    ],
)
def test_latest_must_name_a_checkpoint(tmp_path, content, shown):
    """In both adapters: GPT-NeoX goes where it leads."""
    folder = tmp_path / "checkpoints"
    save_step(folder, 10)
    (tmp_path.parent / "outside").mkdir(exist_ok=True)
    (folder / "latest").write_bytes(content)
    named = f"latest names '{shown}.*', which is not there"
    with pytest.raises(SettingsError, match=named):
        check_load(settings(str(folder)))
    with pytest.raises(SettingsError, match=named):
        go_on_from_save(settings("base", save=str(folder)))
    with pytest.raises(ConvertError, match=named):
        find_step(folder, None)


def test_latest_must_be_a_file(tmp_path):
    (tmp_path / "latest").mkdir()
    with pytest.raises(SettingsError, match="wanted a file `latest` naming one"):
        check_load(settings(str(tmp_path)))


def test_the_settings_of_a_checkpoint_that_are_no_text_are_named(tmp_path):
    save_run(tmp_path, {})
    (tmp_path / "global_step10/configs/run.yml").write_bytes(b"\xff")
    with pytest.raises(SettingsError, match="run.yml: cannot be read"):
        go_on_from_save(settings("base", save=str(tmp_path)))


@pytest.mark.parametrize("load", [None, "folder"])
def test_training_is_not_told_to_load_no_optimizer(load):
    """GPT-NeoX takes it for inference and optimises the first of the model's tensors alone."""
    with pytest.raises(SettingsError, match="no_load_optim: found true, wanted false"):
        check_load(settings(load, no_load_optim=True))


def save_states(folder, **changes) -> None:
    save_step(folder, 10)
    states = {key: v for key, v in {**STATES, **changes}.items() if v != "absent"}
    torch.save(states, folder / "global_step10/mp_rank_00_model_states.pt")


# The files of two layers, tensor parallel 2, pipeline parallel 2, and those of ZeRO beside tensor
# parallel 2.
PIPELINE_FILES = [f"mp_rank_0{rank}_model_states.pt" for rank in (1, 2, 3)] + [
    f"layer_0{layer}-model_0{rank}-model_states.pt" for layer in (0, 2, 3, 5, 6) for rank in (0, 1)
]
ZERO_FILES = [
    f"zero_pp_rank_{data}_mp_rank_0{rank}_optim_states.pt" for data in (0, 1) for rank in (0, 1)
]


def save_files(folder, *names: str) -> None:
    """Files of other ranks, of a step that is there."""
    for name in names:
        torch.save({"weight": torch.arange(8)}, folder / "global_step10" / name)


def test_a_checkpoint_in_the_layout_of_the_settings_passes(tmp_path):
    save_states(tmp_path / "whole")
    check_load(settings(str(tmp_path / "whole")))
    save_states(tmp_path / "two", module=None, mp_world_size=4, args={"model_parallel_size": 2})
    save_files(tmp_path / "two", *PIPELINE_FILES)
    check_load(settings(str(tmp_path / "two"), model_parallel_size=2, pipe_parallel_size=2))
    universal = {"checkpoint": {"load_universal": True}, "model_parallel_size": 4}
    check_load(settings(str(tmp_path / "two"), **universal))


@pytest.mark.parametrize(
    ("states", "changes", "message"),
    [
        ({}, {"pipe_parallel_size": 1}, "pipe_parallel_size: found 1, wanted 0, as in"),
        ({"module": None}, {}, "pipe_parallel_size: found 0, wanted at least 1, as in"),
        ({}, {"model_parallel_size": 2}, "model_parallel_size: found 2, wanted 1, as in"),
    ],
)
def test_a_checkpoint_in_another_layout_is_named(tmp_path, states, changes, message):
    save_states(tmp_path, **states)
    with pytest.raises(SettingsError, match=message):
        check_load(settings(str(tmp_path), **changes))


def cut(file, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize("layout", ["pipeline", "ZeRO", "whole"])
def test_every_file_of_every_rank_is_looked_at(tmp_path, layout):
    """DeepSpeed ends in a traceback that names none of them."""
    names, states, run = {
        "pipeline": (
            PIPELINE_FILES,
            {"module": None, "mp_world_size": 4},
            {"pipe_parallel_size": 2},
        ),
        "ZeRO": (
            ["mp_rank_01_model_states.pt", *ZERO_FILES],
            {"optimizer": None, "dp_world_size": 2},
            {"zero_optimization": {"stage": 1}, "global_num_gpus": 4},
        ),
        "whole": (["mp_rank_01_model_states.pt"], {}, {}),
    }[layout]
    save_states(tmp_path, args={"model_parallel_size": 2}, **states)
    save_files(tmp_path, *names)
    args = settings(str(tmp_path), model_parallel_size=2, **run)
    check_load(args)
    for file in [tmp_path / "global_step10" / n for n in ("mp_rank_00_model_states.pt", *names)]:
        content = file.read_bytes()
        for damage, message in (
            (lambda f: f.unlink(), "is missing"),
            (lambda f: cut(f, 0), "truncated or no PyTorch file"),
            (lambda f: cut(f, len(f.read_bytes()) - 8), "truncated or no PyTorch file"),
            (lambda f: f.write_text("version https://git-lfs"), "truncated or no PyTorch file"),
        ):
            damage(file)
            with pytest.raises(SettingsError, match=f"load: {file}: .*{message}"):
                check_load(args)
            file.write_bytes(content)
    check_load(args)
    if layout == "pipeline":
        save_files(tmp_path, "layer_02-model_02-model_states.pt")
        with pytest.raises(SettingsError, match="layer_02-model_02-.*: a file of no rank"):
            check_load(args)


def test_a_pipeline_that_was_cut_otherwise_is_named(tmp_path):
    save_states(tmp_path, module=None, mp_world_size=4, args={"model_parallel_size": 2})
    save_files(tmp_path, *PIPELINE_FILES)
    run = {"model_parallel_size": 2, "pipe_parallel_size": 1}
    with pytest.raises(SettingsError, match="pipe_parallel_size: found 1, wanted 2, as in"):
        check_load(settings(str(tmp_path), **run))
    check_load(settings(str(tmp_path), **run, finetune=True))


@pytest.mark.parametrize("has_legacy_format", [False, True])
def test_nothing_of_a_checkpoint_runs(tmp_path, has_legacy_format):
    """The run is refused in one line, and no code of the checkpoint runs."""

    class Hostile:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "ran",))

    save_step(tmp_path, 10)
    torch.save(
        {**STATES, "more": Hostile()},
        tmp_path / "global_step10/mp_rank_00_model_states.pt",
        _use_new_zipfile_serialization=not has_legacy_format,
    )
    with pytest.raises(SettingsError, match="mp_rank_00_.*: refused: reading it would run code"):
        check_load(settings(str(tmp_path)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("states", [[], {"args": 3}, {"optimizer": 3}, {"dp_world_size": "x"}])
def test_senseless_states_end_in_one_line(tmp_path, states):
    save_step(tmp_path, 10)
    states = {**STATES, **states} if states else states
    torch.save(states, tmp_path / "global_step10/mp_rank_00_model_states.pt")
    try:
        check_load(settings(str(tmp_path)))
    except SettingsError as refused:
        assert "\n" not in str(refused)


def test_weights_alone_are_not_a_run_to_resume(tmp_path):
    save_states(tmp_path, lr_scheduler=None, random_rng_state="absent")
    load, generate = str(tmp_path), {"user_script": "./generate.py", "no_load_optim": True}
    with pytest.raises(SettingsError, match="finetune: found False, wanted True: .* no optimizer "):
        check_load(settings(load))
    with pytest.raises(SettingsError, match="no_load_rng: found False, .* has no random states"):
        check_load(settings(load, **generate))
    check_load(settings(load, finetune=True))
    check_load(settings(load, **generate, no_load_rng=True))


def test_a_run_without_random_states_keeps_its_optimizer(tmp_path):
    """`no_save_rng: true`, then gone on from."""
    save_states(tmp_path, random_rng_state="absent")
    with pytest.raises(SettingsError, match="no_load_rng: found False, wanted True, which"):
        check_load(settings(str(tmp_path)))
    check_load(settings(str(tmp_path), no_load_rng=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 2e-3}, "optimizer.params.lr: found 0.002, wanted 0.001, as in"),
        ({"min_lr": 0.0}, "min_lr: found 0.0, wanted 0.0001, as in"),
        ({"lr_decay_style": "linear"}, "lr_decay_style: found linear, wanted cosine, as in"),
        ({"train_iters": 40}, "train_iters: found 40 steps, wanted 20 steps, as in"),
        ({"lr_decay_iters": 30}, "lr_decay_iters: found 30 steps, wanted 20 steps, as in"),
        ({"lr_decay_fraction": 0.5}, "train_iters: found 10 steps, wanted 20 steps, as in"),
        ({"warmup": 0.2}, "warmup: found 4.0 steps, wanted 2.0 steps, as in .*; override_lr_sch"),
    ],
)
def test_another_schedule_is_named(tmp_path, changes, message):
    save_states(tmp_path)
    load = str(tmp_path)
    with pytest.raises(SettingsError, match=message):
        check_load(settings(load, **changes))
    chosen = {"override_lr_scheduler": True, "use_checkpoint_lr_scheduler": True}
    for name in chosen:
        check_load(settings(load, **changes, **{name: True}))
    with pytest.raises(SettingsError, match="use_checkpoint_lr_scheduler: found true, wanted fals"):
        check_load(settings(load, **changes, **chosen))
    check_load(settings(load, finetune=True, **changes))
    check_load(settings(load, user_script="./generate.py", no_load_optim=True, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": 0.2}, "weight_decay: found 0.2, wanted 0.1, as in .*, or finetune"),
        (
            {"optimizer": {"type": "Adam", "params": {}}},
            r"optimizer.params.betas: found \[0.9, 0.999\], wanted \[0.9, 0.95\], as in",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95], "eps": 1e-6}}},
            "optimizer.params.eps: found 1e-06, wanted 1e-08, as in",
        ),
        (
            {"optimizer": {"type": "lion", "params": {"betas": [0.9, 0.95]}}},
            "optimizer.type: found 'lion', wanted Adam, as in",
        ),
    ],
)
def test_what_the_optimizers_states_hold_may_not_change(tmp_path, changes, message):
    save_states(tmp_path)
    check_load(settings(str(tmp_path), **changes))  # nothing tells
    (tmp_path / "global_step10/configs").mkdir()
    file = tmp_path / "global_step10/configs/a.yml"
    file.write_text("optimizer: {type: Adam, params: {lr: 5.0e-3, betas: [0.9, 0.95]}}")
    check_load(settings(str(tmp_path)))
    spelled_out = {"type": "Adam", "params": {"betas": [0.9, 0.95], "eps": 1e-8}}
    check_load(settings(str(tmp_path), optimizer=spelled_out))
    check_load(settings(str(tmp_path), finetune=True, **changes))
    with pytest.raises(SettingsError, match=message):
        check_load(settings(str(tmp_path), **changes))


@pytest.mark.parametrize(("now", "split"), [(8, 1), (16, 1), (4, 2), (8, 2)])
def test_another_batch_is_told(tmp_path, monkeypatch, capsys, now, split):
    """DeepSpeed was told 8 samples a batch. Context-parallel ranks had one sample in common."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    save_states(tmp_path, ds_config={"train_batch_size": 8}, iteration=10)
    (tmp_path / "global_step10/configs").mkdir()
    options = (
        f"metala: {{context_parallel_size: {split}}}\n"
        "optimizer: {type: Adam, params: {betas: [0.9, 0.95]}}"
    )
    (tmp_path / "global_step10/configs/a.yml").write_text(options)
    check_load(settings(str(tmp_path), train_batch_size=now))
    told = capsys.readouterr().out
    if now == 8 // split:
        assert not told
    else:
        assert told.startswith(f"MetaLA: train_batch_size: found {now}, and {8 // split} in ")
        assert f"goes on at sample {10 * now} of its data, not at {80 // split}, where" in told


def test_a_finished_run_is_told_and_a_shorter_one_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    save_states(tmp_path, iteration=10)
    told = []
    for train_iters in (20, 10):
        check_load(settings(str(tmp_path), train_iters=train_iters, lr_decay_iters=20))
        told.append(capsys.readouterr().out)
    assert told[0] == ""
    assert "mp_rank_00_model_states.pt has all 10 iterations behind it, so nothing" in told[1]
    with pytest.raises(SettingsError, match="train_iters: found 9, wanted at least 10, the iterat"):
        check_load(settings(str(tmp_path), train_iters=9, lr_decay_iters=20))
    check_load(settings(str(tmp_path), train_iters=9, finetune=True))


def test_another_model_is_named(tmp_path):
    """GPT-NeoX asserts it on every rank, when fine-tuning too."""
    save_states(tmp_path, args={"model_parallel_size": 1, "num_layers": 2, "padded_vocab_size": 8})
    unknown_yet = {"padded_vocab_size": None}
    check_load(settings(str(tmp_path), num_layers=2, **unknown_yet))
    with pytest.raises(SettingsError, match="num_layers: found 4, wanted 2, as in"):
        check_load(settings(str(tmp_path), num_layers=4, finetune=True, **unknown_yet))


def test_another_number_of_ranks_is_named_under_zero(tmp_path):
    save_states(tmp_path, optimizer=None, dp_world_size=2, args={"model_parallel_size": 2})
    save_files(tmp_path, "mp_rank_01_model_states.pt", *ZERO_FILES)
    run = {"zero_optimization": {"stage": 1}, "model_parallel_size": 2}
    check_load(settings(str(tmp_path), global_num_gpus=4, **run))
    with pytest.raises(SettingsError, match="global_num_gpus: found 8, wanted 4, since ZeRO"):
        check_load(settings(str(tmp_path), global_num_gpus=8, **run))
    check_load(settings(str(tmp_path), global_num_gpus=8, finetune=True, **run))


SAVE = """
from megatron.checkpointing import save_checkpoint
from megatron.training import setup_model_and_optimizer, train_step
from megatron.utils import Timers
model, optimizer, lr_scheduler, _ = setup_model_and_optimizer(neox_args)
batches = iter([{"text": torch.arange(65).repeat(4, 1)}])
timers = Timers(use_wandb=False, tensorboard_writer=None, comet_experiment=None)
train_step(neox_args, timers, batches, model, optimizer, lr_scheduler)
save_checkpoint(neox_args, 1, model, optimizer, lr_scheduler)
answer(None)
"""
LOAD = """
from megatron.training import setup_model_and_optimizer
from megatron_patch.neox.upstream_fixes.resume import check_load
refusal = error = None
try:
    check_load(neox_args)
except ValueError as refused:
    refusal = str(refused)
try:
    setup_model_and_optimizer(neox_args)
except Exception as failed:
    error = repr(failed)
answer([refusal, error])
"""


@pytest.fixture(scope="module")
def saved(in_neox, tokenizer_file, tmp_path_factory):
    """A folder of checkpoints of one step, named by ZeRO stage and precision, made when asked."""
    folder = tmp_path_factory.mktemp("saved")

    def settings_of(stage: int, precision: str, **changes) -> dict:
        zero = {"zero_optimization": {"stage": stage}, "precision": precision}
        return training_settings("none", tokenizer_file, **zero, **changes)

    def make(stage: int, precision: str) -> str:
        path = folder / f"{stage}-{precision}"
        if not path.exists():
            in_neox(settings_of(stage, precision, save=str(path), checkpoint_factor=1), SAVE)
        return str(path)

    make.settings = settings_of
    return make


@pytest.mark.parametrize(
    ("before", "now", "finetune", "message"),
    [
        ((0, "fp32"), (1, "fp32"), False, "zero_optimization.stage: found 1, wanted 0, as in"),
        ((0, "fp32"), (0, "bfloat16"), False, "precision: found 'bfloat16', wanted fp32, as in"),
        ((1, "fp32"), (0, "fp32"), False, "zero_optimization.stage: found 0, wanted 1, as in"),
        ((1, "fp32"), (1, "bfloat16"), False, "precision: found 'bfloat16', wanted another one,"),
        ((1, "fp32"), (2, "fp32"), False, None),
        ((1, "fp32"), (3, "fp32"), True, "zero_optimization.stage: found 3, wanted another one,"),
        ((3, "fp32"), (1, "fp32"), True, "zero_optimization.stage: found 1, wanted 3, as in"),
        ((3, "fp32"), (3, "fp32"), False, None),
    ],
)
def test_deepspeed_loads_what_is_not_refused(in_neox, saved, before, now, finetune, message):
    """And what is refused it cannot load."""
    config = saved.settings(*now, load=saved(*before), finetune=finetune)
    refusal, error = in_neox(config, LOAD)
    assert (refusal is None) == (error is None) == (message is None), (refusal, error)
    if message:
        assert refusal.startswith(message)


IN_OTHER_HANDS = """
import json, os
from pathlib import Path
from megatron.training import save_checkpoint, setup_model_and_optimizer
from megatron_patch.neox.upstream_fixes.saving import HOLDER, check_save
model, optimizer, lr_scheduler, _ = setup_model_and_optimizer(neox_args)
save = Path(neox_args.save)
lock = save / "run.lock"
def left(run):
    os.environ[HOLDER] = "node1:1:0"
    lock.write_text(json.dumps({"run": run}))
    try:
        save_checkpoint(neox_args, 1, model, optimizer, lr_scheduler)
    except SystemExit as end:
        assert end.code == 1
    return sorted(path.name for path in save.iterdir())
others, own = left("node2:1:0"), left("node1:1:0")
try:
    neox_args.save = "/proc/none"
    check_save(neox_args)
except SystemExit as end:
    own.append(end.code)
answer([others, own])
"""


def test_what_another_run_holds_is_not_written_to(in_neox, saved, tmp_path):
    """Nor what a rank cannot write to, on whichever host."""
    config = saved.settings(0, "fp32", save=str(tmp_path), checkpoint_factor=1)
    others, own = in_neox(config, IN_OTHER_HANDS)
    assert others == ["run.lock"]
    assert own == ["global_step1", "latest", "run.lock", 1]


def save_run(folder, config: dict, step: int = 10) -> None:
    """The files that GPT-NeoX leaves of a run with these settings."""
    save_step(folder, step)
    (folder / f"global_step{step}/configs").mkdir()
    (folder / f"global_step{step}/configs/run.yml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../base"])
@pytest.mark.parametrize("start", [{"finetune": True}, {"iteration": 7}, {}])
def test_a_stopped_run_goes_on_from_save(tmp_path, capsys, start, spelling):
    base, save = tmp_path / "base", tmp_path / "save"
    base.mkdir()
    config = {"load": str(base), **start}
    args = settings(**{**config, "save": str(save)}, config_files={"a.yml": yaml.safe_dump(config)})
    go_on_from_save(args)
    assert (args.load, args.finetune) == (str(base), start.get("finetune", False))
    save_run(save, {**config, "load": spelling.format(base)})
    go_on_from_save(args)
    assert (args.load, args.finetune, args.iteration) == (str(save), False, None)
    line = "MetaLA: save holds global_step10 of this run, which goes on from there\n"
    assert capsys.readouterr().out == line


def test_a_run_that_loads_nothing_goes_on_from_save(tmp_path):
    save_run(tmp_path, {"train_iters": 20})
    args = settings(None, save=str(tmp_path))
    go_on_from_save(args)
    assert args.load == str(tmp_path)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"load": "elsewhere", "finetune": True}, {"load": "base", "finetune": True}),
        ({}, {"load": "base", "finetune": True}),
        ({"load": "base"}, {"load": "base", "finetune": True}),
        ({"load": "base", "iteration": 3}, {"load": "base", "iteration": 4}),
        ({"load": "base"}, {}),
        ({"load": "save"}, {"load": "save", "finetune": True}),
    ],
)
def test_steps_of_another_run_are_not_written_over(tmp_path, monkeypatch, before, now):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "save", before)
    args = settings(
        **{"load": None, **now, "save": "save"}, config_files={"a.yml": yaml.safe_dump(now)}
    )
    with pytest.raises(SettingsError, match="save: found save/global_step10, of a run wit"):
        go_on_from_save(args)


def test_nothing_changes_where_load_is_save_or_nothing_is_trained(tmp_path):
    save_run(tmp_path, {"load": "elsewhere"})
    for changes in ({}, {"save": f"{tmp_path}/"}, {"save": None}):
        args = settings(str(tmp_path), iteration=10, **changes)
        go_on_from_save(args)
        assert (args.load, args.iteration) == (str(tmp_path), 10)
    args = settings("base", save=str(tmp_path), user_script="generate.py")
    go_on_from_save(args)
    assert args.load == "base"


def test_save_without_latest_is_said(tmp_path):
    save_step(tmp_path, 10, latest=False)
    with pytest.raises(SettingsError, match=r"save: found \['global_step10'\].*wanted a file `lat"):
        go_on_from_save(settings("base", save=str(tmp_path)))


def test_only_learned_positions_bind_a_checkpoint_to_a_length(tmp_path, in_neox, config):
    save_step(tmp_path, 10)
    states = {**STATES, "args": {"model_parallel_size": 1, "max_position_embeddings": 64}}
    torch.save(states, tmp_path / "global_step10/mp_rank_00_model_states.pt")
    run = dict(max_position_embeddings=128, finetune=True)
    check_load(settings(str(tmp_path), pos_emb="none", **run))
    with pytest.raises(SettingsError, match="max_position_embeddings: found 128, wanted 64, as in"):
        check_load(settings(str(tmp_path), pos_emb="learned", **run))

    code = """
    from megatron.checkpointing import check_checkpoint_args
    refused = []
    for positions, changes in (("none", {}), ("none", {"hidden_size": 32}), ("learned", {})):
        neox_args.pos_emb = positions
        try:
            check_checkpoint_args(neox_args, {"max_position_embeddings": 32, **changes})
        except AssertionError as error:
            refused.append(str(error).split()[0])
    answer(refused)
    """
    assert in_neox(config, code) == ["hidden_size", "max_position_embeddings"]
