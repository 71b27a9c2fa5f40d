"""Runs side by side meet at ports of their own, and the user's environment is heeded or refused."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import pytest

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.upstream_fixes.rendezvous import check_rank, settle_port
from tests.neox.training import free_port, neox, stand_in
from tests.neox.training import settings as settings_of_a_run


def settings(**changes) -> SimpleNamespace:
    unset = dict.fromkeys("hostfile master_addr deepspeed_slurm deepspeed_mpi".split())
    return stand_in({**unset, "master_port": 29500, "global_num_gpus": 2}, **changes)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path) -> dict[str, str]:
    """Empty; what is set in it is not kept."""
    (tmp_path / "hosts").write_text("worker-0 slots=4\nworker-1 slots=4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {})
    return os.environ


@pytest.fixture
def taken():
    """A port at which another process would listen."""
    with socket.socket() as listener:
        listener.bind(("", free_port()))
        listener.listen()
        yield listener.getsockname()[1]


def test_each_run_on_a_machine_gets_a_port():
    ports = set()
    for _ in range(5):
        args = settings()
        settle_port(args, is_given=False)
        with socket.socket() as listener:
            listener.bind(("", args.master_port))
        ports.add(args.master_port)
    assert len(ports) > 1 and 29500 not in ports


@pytest.mark.parametrize("changes", [{}, {"hostfile": "hosts"}, {"deepspeed_slurm": True}])
def test_a_port_that_the_user_names_is_kept(environment, changes):
    port = free_port()
    args = settings(master_port=port, **changes)
    settle_port(args, is_given=True)
    assert args.master_port == port
    environment["MASTER_PORT"] = str(port)
    settle_port(args, is_given=True)
    args = settings(**changes)
    settle_port(args, is_given=False)
    assert args.master_port == port


def test_other_hosts_are_not_asked_for_a_port(taken):
    for changes in ({"hostfile": "hosts"}, {"deepspeed_slurm": True}):
        args = settings(master_port=taken, **changes)
        settle_port(args, is_given=True)
        assert args.master_port == taken
    args = settings(hostfile="hosts")
    settle_port(args, is_given=False)
    assert args.master_port == 29500


def test_a_port_that_is_taken_is_refused(environment, taken):
    message = f"master_port: found {taken}, wanted a free port, or none"
    with pytest.raises(SettingsError, match=message):
        settle_port(settings(master_port=taken), is_given=True)
    environment["MASTER_PORT"] = str(taken)
    with pytest.raises(SettingsError, match=message):
        settle_port(settings(), is_given=False)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        (
            {"master_port": 6001},
            {"MASTER_PORT": "6000"},
            "master_port: found 6001, wanted 6000, as MASTER_PORT says in the environment",
        ),
        (
            {"master_addr": "node1", "hostfile": "hosts"},
            {"MASTER_ADDR": "node0"},
            "master_addr: found 'node1', wanted node0, as MASTER_ADDR says",
        ),
        ({"master_port": 29500}, {"MASTER_PORT": "tcp"}, "master_port: found 29500, wanted tcp"),
        (
            {"master_port": 6001, "deepspeed_mpi": True},
            {},
            "master_port: found 6001, wanted none, or 29500, DeepSpeed's port under MPI",
        ),
        (
            {"master_addr": "node0", "deepspeed_mpi": True},
            {},
            "master_addr: found 'node0', wanted none under MPI",
        ),
    ],
)
def test_setting_and_environment_that_disagree_are_refused(environment, changes, given, message):
    environment |= given
    with pytest.raises(SettingsError, match=message):
        settle_port(settings(**changes), is_given=True)


@pytest.mark.parametrize("port", ["tcp", "0", "65536", "-1"])
def test_no_port_is_refused(environment, port):
    environment["MASTER_PORT"] = port
    with pytest.raises(SettingsError, match=f"MASTER_PORT: found '{port}', wanted the number of a"):
        settle_port(settings(), is_given=False)


def test_the_launcher_is_no_rank(environment):
    check_rank(settings())
    environment |= {"RANK": "0", "WORLD_SIZE": "1"}  # as a pod of one process has them
    check_rank(settings())
    environment["RANK"] = "1"
    with pytest.raises(SettingsError, match="RANK: found 1 in the environment, wanted none"):
        check_rank(settings())


def test_mpi_chooses_whatever_the_environment_says(environment):
    environment |= {"MASTER_PORT": "12802", "MASTER_ADDR": "node0"}
    args = settings(deepspeed_mpi=True)
    settle_port(args, is_given=False)
    assert args.master_port == 29500


@pytest.mark.parametrize("port", [0, 65536, 70000])
def test_a_number_that_no_port_has_is_refused(port):
    with pytest.raises(SettingsError, match=f"master_port: found {port}, wanted the number of a"):
        settle_port(settings(master_port=port), is_given=True)


def test_null_is_no_port():
    args = settings(master_port=None)
    settle_port(args, is_given=True)
    assert args.master_port != 29500


def test_a_rank_that_starts_deepy_ends_with_one_line(
    neox_checkout, token_data, tokenizer_file, tmp_path, monkeypatch
):
    monkeypatch.undo()
    config = settings_of_a_run(token_data, tokenizer_file)
    rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    run = neox(neox_checkout, "train.py", config, tmp_path, **rank)
    assert run.returncode == 1
    wanted = "MetaLA: RANK: found 1 in the environment, wanted none: deepy.py is started once"
    assert run.output.splitlines()[-1].startswith(wanted)
