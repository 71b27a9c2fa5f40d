"""The ranks that are counted are those that DeepSpeed's launcher starts."""

from __future__ import annotations

import base64
import json
import os
from types import SimpleNamespace

import pytest
import yaml
from deepspeed.accelerator import get_accelerator
from deepspeed.launcher import runner

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.upstream_fixes import cpu_mode
from megatron_patch.neox.upstream_fixes.processes import check_running_ranks, count_ranks
from tests.neox.training import settings as settings_of_a_run
from tests.neox.training import stand_in

HOSTS = "worker-0 slots=4\nworker-1 slots=2\n"


def settings(**changes) -> SimpleNamespace:
    unset = "autotuning_run global_num_gpus hostfile include exclude num_gpus deepspeed_slurm "
    defaults = dict.fromkeys((unset + "deepspeed_mpi").split())
    return stand_in({**defaults, "num_nodes": -1, "distributed_backend": "nccl"}, **changes)


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(get_accelerator(), "device_name", lambda index=None: "cuda")
    monkeypatch.setattr(get_accelerator(), "device_count", lambda: 4)
    for name in ("CUDA_VISIBLE_DEVICES", "DLTS_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "hosts").write_text(HOSTS)
    monkeypatch.chdir(tmp_path)


def started(monkeypatch, args: SimpleNamespace) -> dict[str, list[int]]:
    """The devices of each host, by DeepSpeed's own `main`, up to where it knows them, from the
    arguments that GPT-NeoX passes on."""

    class Known(Exception):
        pass

    def stop(hosts):
        raise Known(hosts)

    monkeypatch.setattr(runner, "encode_world_info", stop)
    names = "hostfile include exclude num_nodes num_gpus".split()
    given = {name: getattr(args, name) for name in names if getattr(args, name) not in (None, -1)}
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    with pytest.raises(Known) as known:
        runner.main([*flags, "--no_ssh_check", "--master_addr", "127.0.0.1", "train.py"])
    return known.value.args[0]


VISIBLE = {"CUDA_VISIBLE_DEVICES": "1,2,3"}
ALL = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
TWO_HOSTS = {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1]}


def here(*devices: int) -> dict[str, list[int]]:
    return {"localhost": list(devices)}


@pytest.mark.parametrize(
    ("arguments", "environment", "devices"),
    [
        ({}, {}, here(0, 1, 2, 3)),
        ({"num_gpus": 2}, {}, here(0, 1)),
        ({"include": "localhost:0,3"}, {}, here(0, 3)),
        ({"exclude": "localhost:1"}, {}, here(0, 2, 3)),
        ({}, VISIBLE, here(1, 2, 3)),
        ({"num_gpus": 1}, VISIBLE, here(1)),
        ({"num_gpus": 1}, {"CUDA_VISIBLE_DEVICES": "3, 1"}, here(3)),
        ({"num_gpus": 2}, {"CUDA_VISIBLE_DEVICES": "3,1,0"}, here(1, 3)),
        ({"num_gpus": 3}, VISIBLE, here(1, 2, 3)),
        ({"num_nodes": 1}, VISIBLE, here(1, 2, 3)),
        ({"num_nodes": 1, "num_gpus": 2}, VISIBLE, here(1, 2)),
        ({"include": "localhost:1,3"}, VISIBLE, here(1, 3)),
        ({"include": "localhost"}, VISIBLE, here(1, 2, 3)),
        ({"exclude": "localhost:1"}, VISIBLE, here(2, 3)),
        ({"hostfile": "hosts"}, {}, TWO_HOSTS),
        ({"hostfile": "/mock_path"}, VISIBLE, here(1, 2, 3)),  # as in GPT-NeoX's 125M.yml
        ({"hostfile": "hosts"}, ALL, TWO_HOSTS),
        ({"hostfile": "hosts", "num_nodes": 1}, {}, {"worker-0": [0, 1, 2, 3]}),
        ({"hostfile": "hosts", "num_gpus": 1}, {}, {"worker-0": [0], "worker-1": [0]}),
        (
            {"hostfile": "hosts", "include": "worker-1@worker-0:2"},
            {},
            {"worker-0": [2], "worker-1": [0, 1]},
        ),
        (
            {"hostfile": "hosts", "include": "worker-0:1,2"},
            VISIBLE,
            {"worker-0": [1, 2]},
        ),
        ({"hostfile": "hosts", "exclude": "worker-1"}, {}, {"worker-0": [0, 1, 2, 3]}),
    ],
)
def test_what_will_run_is_chosen_and_counted(monkeypatch, arguments, environment, devices):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = settings(**arguments)
    count_ranks(args)
    assert args.global_num_gpus == sum(map(len, devices.values()))
    assert started(monkeypatch, args) == devices


def test_two_trainings_side_by_side_run_on_their_own_gpus(
    in_neox, token_data, tokenizer_file, tmp_path
):
    """From `deepy.py`'s arguments to where DeepSpeed starts processes, on a machine of four GPUs.
    Each training has a port of its own."""
    file = tmp_path / "run.yml"
    config = settings_of_a_run(token_data, tokenizer_file, distributed_backend="nccl", num_gpus=1)
    file.write_text(yaml.safe_dump(config))
    code = """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher import runner
    get_accelerator().device_name = lambda index=None: "cuda"
    get_accelerator().device_count = lambda: 4
    found = []

    def stop(command, env):
        found.append(command)
        raise KeyboardInterrupt

    for visible in ("2", "3", "1,0"):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
        os.environ.pop("MASTER_PORT", None)
        deepy = NeoXArgs.consume_deepy_args(["train.py", %r])
        runner.subprocess.Popen = stop
        try:
            runner.main(deepy.get_deepspeed_main_args())
        except KeyboardInterrupt:
            pass
    answer([deepy.global_num_gpus, found])
    """
    ranks, commands = in_neox(settings_of_a_run(token_data, tokenizer_file), code % str(file))
    given = [dict(part[2:].split("=", 1) for part in c if "=" in part) for c in commands]
    hosts = [json.loads(base64.urlsafe_b64decode(flags["world_info"])) for flags in given]
    assert hosts == [here(2), here(3), here(1)] and ranks == 1
    assert len({flags["master_port"] for flags in given}) == 3


@pytest.mark.parametrize("variable", ["", "0", "-1", "GPU-8f3a"])
def test_a_run_on_the_cpu_takes_no_devices(monkeypatch, variable):
    monkeypatch.setattr(os, "environ", {**os.environ, "CUDA_VISIBLE_DEVICES": variable})
    monkeypatch.setattr(cpu_mode, "_redirect_cuda", lambda: None)
    monkeypatch.setattr(cpu_mode, "_avoid_compiled_ops", lambda: None)
    args = settings(distributed_backend="gloo", precision="fp32", fp16=None)
    args.model_parallel_size, args.pipe_parallel_size = 4, 1
    cpu_mode.activate_cpu_mode(args)
    count_ranks(args)
    assert args.global_num_gpus == 4
    assert started(monkeypatch, args) == here(0, 1, 2, 3)


@pytest.mark.parametrize("launcher", ["deepspeed_slurm", "deepspeed_mpi"])
def test_slurm_and_mpi_get_the_variable_as_it_is(monkeypatch, launcher):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3a")
    args = settings(hostfile="hosts", num_gpus=1, **{launcher: True})
    count_ranks(args)
    assert args.global_num_gpus == 2 and args.num_gpus == 1
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-8f3a"


@pytest.mark.parametrize("variable", ["-1", "GPU-8f3a"])
def test_beside_a_hostfile_the_variable_need_not_hold_numbers(monkeypatch, variable):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    args = settings(hostfile="hosts", num_gpus=1)
    count_ranks(args)
    assert args.global_num_gpus == 2 and os.environ["CUDA_VISIBLE_DEVICES"] == variable


def test_the_hostfile_of_the_environment_is_the_one_that_is_used(monkeypatch, tmp_path):
    """GPT-NeoX puts it last on DeepSpeed's command line."""
    (tmp_path / "others").write_text("worker-7 slots=8\n")
    monkeypatch.setenv("DLTS_HOSTFILE", "others")
    args = settings(hostfile="hosts")
    count_ranks(args)
    assert args.global_num_gpus == 8


@pytest.mark.parametrize(
    ("changes", "visible", "message"),
    [
        (
            {"num_gpus": 2, "global_num_gpus": 4},
            "",
            r"global_num_gpus: found 4, wanted 2 \(or none",
        ),
        ({"include": "localhost:7"}, "", "include, exclude: No slot '7' specified on host 'localh"),
        ({"include": "worker-9"}, None, "include, exclude: Hostname 'worker-9' not found"),
        ({"num_gpus": 5}, None, "num_gpus: found 5, wanted at most 4, as many as are visible"),
        ({"hostfile": "nowhere"}, None, "hostfile: found 'nowhere', wanted a file, or none: DeepS"),
        ({"num_nodes": 2}, None, "num_nodes: found 2, wanted a hostfile"),
        ({"num_gpus": 2}, "3", "num_gpus: found 2, wanted at most 1, as many as are visible"),
        (
            {"include": "localhost:0"},
            "1,2",
            r"No slot '0' specified on host 'localhost' \(beside CUDA_VISIBLE_DEVICES=1,2\)",
        ),
        ({"num_gpus": 1}, "2,2", "CUDA_VISIBLE_DEVICES: found '2,2', wanted different numbers"),
        ({"num_gpus": 1}, "GPU-8f3a", "CUDA_VISIBLE_DEVICES: found 'GPU-8f3a', wanted different"),
        ({"num_gpus": 1}, "MIG-8f3a", "CUDA_VISIBLE_DEVICES: found 'MIG-8f3a', wanted different"),
        ({}, "-1", "CUDA_VISIBLE_DEVICES: found '-1', wanted different numbers of GPUs"),
        ({}, "3,4", "CUDA_VISIBLE_DEVICES: found '3,4', wanted numbers below 4, as this machine"),
        (
            {"hostfile": "hosts"},
            "2,3",
            "CUDA_VISIBLE_DEVICES: found '2,3', wanted none, or one with all of 0,1,2,3, which run",
        ),
        (
            {"hostfile": "hosts", "num_gpus": 1},
            "1",
            "CUDA_VISIBLE_DEVICES: found '1', wanted none, or one with all of 0, which run on wor",
        ),
    ],
)
def test_what_cannot_run_is_refused(monkeypatch, changes, visible, message):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(SettingsError, match=message):
        count_ranks(settings(**changes))


@pytest.mark.parametrize("visible", [None, "", "0"])
def test_no_gpu_is_said(monkeypatch, visible):
    """DeepSpeed then counts the machine's processors."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(get_accelerator(), "device_name", lambda index=None: "cpu")
    with pytest.raises(SettingsError, match="distributed_backend: found no GPU, wanted one, or gl"):
        count_ranks(settings(num_gpus=2))


def test_other_ranks_than_counted_end_at_once():
    args = settings(global_num_gpus=4, world_size=4, rank=0)
    check_running_ranks(args)
    args.world_size = 2
    with pytest.raises(SystemExit, match="global_num_gpus: found 4, .* wanted 2, the number"):
        check_running_ranks(args)
    args.rank = 1
    with pytest.raises(SystemExit) as ended:
        check_running_ranks(args)
    assert ended.value.code == 1
