"""The ranks that are counted are those that DeepSpeed's launcher starts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.launcher import runner

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.upstream_fixes.processes import check_running_ranks, count_ranks
from tests.neox.training import stand_in

HOSTS = "worker-0 slots=4\nworker-1 slots=2\n"


def settings(**changes) -> SimpleNamespace:
    unset = "autotuning_run global_num_gpus hostfile include exclude num_gpus".split()
    return stand_in({**dict.fromkeys(unset), "num_nodes": -1}, **changes)


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(get_accelerator(), "device_count", lambda: 4)
    for name in ("CUDA_VISIBLE_DEVICES", "DLTS_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "hosts").write_text(HOSTS)
    monkeypatch.chdir(tmp_path)


def started(monkeypatch, arguments: dict) -> int:
    """By DeepSpeed's own `main`, up to where it knows hosts and slots."""

    class Known(Exception):
        pass

    def stop(hosts):
        raise Known(sum(len(slots) for slots in hosts.values()))

    monkeypatch.setattr(runner, "encode_world_info", stop)
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    with pytest.raises(Known) as known:
        runner.main([*flags, "--no_ssh_check", "--master_addr", "127.0.0.1", "train.py"])
    return known.value.args[0]


@pytest.mark.parametrize(
    ("arguments", "environment", "ranks"),
    [
        ({}, {}, 4),
        ({"num_gpus": 2}, {}, 2),
        ({"include": "localhost:0,3"}, {}, 2),
        ({"exclude": "localhost:1"}, {}, 3),
        ({}, {"CUDA_VISIBLE_DEVICES": "1,2,3"}, 3),
        ({"num_gpus": 1}, {"CUDA_VISIBLE_DEVICES": "1,2,3"}, 1),
        ({"hostfile": "hosts"}, {}, 6),
        ({"hostfile": "hosts"}, {"CUDA_VISIBLE_DEVICES": "1,2,3"}, 6),
        ({"hostfile": "hosts", "num_nodes": 1}, {}, 4),
        ({"hostfile": "hosts", "num_gpus": 1}, {}, 2),
        ({"hostfile": "hosts", "include": "worker-1@worker-0:2"}, {}, 3),
        ({"hostfile": "hosts", "exclude": "worker-1"}, {}, 4),
    ],
)
def test_what_will_run_is_counted(monkeypatch, arguments, environment, ranks):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = settings(**arguments)
    count_ranks(args)
    assert args.global_num_gpus == ranks
    assert started(monkeypatch, arguments) == ranks


def test_the_hostfile_of_the_environment_is_the_one_that_is_used(monkeypatch, tmp_path):
    """GPT-NeoX puts it last on DeepSpeed's command line."""
    (tmp_path / "others").write_text("worker-7 slots=8\n")
    monkeypatch.setenv("DLTS_HOSTFILE", "others")
    args = settings(hostfile="hosts")
    count_ranks(args)
    assert args.global_num_gpus == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_gpus": 2, "global_num_gpus": 4}, r"global_num_gpus: found 4, wanted 2 \(or none\)"),
        ({"include": "localhost:7"}, "include, exclude: No slot '7' specified on host 'localhost'"),
        ({"include": "worker-9"}, "include, exclude: Hostname 'worker-9' not found"),
    ],
)
def test_what_cannot_run_is_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        count_ranks(settings(**changes))


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(get_accelerator(), "device_count", lambda: 0)
    with pytest.raises(SettingsError, match="distributed_backend: found no GPU, wanted one, or gl"):
        count_ranks(settings())


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
