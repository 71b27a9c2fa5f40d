"""Launchers other than DeepSpeed's own: their needs, and the variables that they give a rank."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.upstream_fixes import processes
from megatron_patch.neox.upstream_fixes.cpu_mode import local_ranks
from megatron_patch.neox.upstream_fixes.processes import check_launcher, name_rank
from tests.neox.training import stand_in

SLURM = {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "6000",
}


def settings(**changes) -> SimpleNamespace:
    values = dict(launcher="pdsh", force_multi=False, deepspeed_slurm=False, deepspeed_mpi=False)
    return stand_in(values, **changes)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Empty; what is set in it is not kept."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(processes, "is_installed", lambda name: True)
    return os.environ


def test_what_runs_passes(environment, monkeypatch):
    check_launcher(settings(), 1)
    check_launcher(settings(), 2)
    check_launcher(settings(launcher="openmpi"), 1)  # which is not used then
    check_launcher(settings(launcher="openmpi", deepspeed_mpi=True), 2)
    environment |= SLURM
    check_launcher(settings(launcher="slurm", deepspeed_slurm=True), 2)
    environment["SLURM_NTASKS_PER_NODE"] = environment.pop("SLURM_NTASKS")
    check_launcher(settings(launcher="slurm", deepspeed_slurm=True), 1)


@pytest.mark.parametrize(
    ("changes", "hosts", "message"),
    [
        (
            {"launcher": "slurm"},
            2,
            "deepspeed_slurm: found false, wanted true with launcher: slurm",
        ),
        (
            {"deepspeed_slurm": True},
            1,
            "deepspeed_slurm: found true, wanted false with launcher: p",
        ),
        ({"launcher": "openmpi"}, 2, "deepspeed_mpi: found false, wanted true with launcher: open"),
        (
            {"launcher": "mvapich", "force_multi": True},
            1,
            "deepspeed_mpi: found false, wanted true",
        ),
        ({"deepspeed_mpi": True}, 2, "deepspeed_mpi: found true, wanted false with launcher: pdsh"),
    ],
)
def test_flags_and_launcher_that_disagree_are_refused(changes, hosts, message):
    with pytest.raises(SettingsError, match=message):
        check_launcher(settings(**changes), hosts)


def test_a_missing_mpi4py_is_named(monkeypatch):
    monkeypatch.setattr(processes, "is_installed", lambda name: False)
    with pytest.raises(SettingsError, match="launcher: found openmpi, .* mpi4py .* extra `mpi`"):
        check_launcher(settings(launcher="openmpi", deepspeed_mpi=True), 2)
    check_launcher(settings(), 2)


@pytest.mark.parametrize("name", SLURM)
def test_what_slurm_must_tell_is_named(environment, name):
    environment |= SLURM
    del environment[name]
    with pytest.raises(SettingsError, match=f"{name}: found none in the environment, wanted "):
        check_launcher(settings(launcher="slurm", deepspeed_slurm=True), 2)


# `deepy.py` leaves these in the environment: GPT-NeoX's own variables, those of a batch script.
LEFT = {"LOCAL_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "SLURM_TASKS_PER_NODE": "9"}
OMPI, MV2 = "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_"


@pytest.mark.parametrize(
    ("given", "rank", "local", "size"),
    [
        (
            {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
            | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            "1", "0", 1,
        ),
        (
            {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}
            | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),3"},
            "5", "1", 3,
        ),
        ({f"{OMPI}RANK": "3", f"{OMPI}LOCAL_RANK": "1", f"{OMPI}LOCAL_SIZE": "2"}, "3", "1", 2),
        ({f"{MV2}RANK": "3", f"{MV2}LOCAL_RANK": "0", f"{MV2}LOCAL_SIZE": "1"}, "3", "0", 1),
        ({"RANK": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}, "6", "2", 4),
        # DeepSpeed's own, in a job of Slurm
        (
            {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_SIZE": "1"}
            | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            "1", "1", 2,
        ),
    ],
)  # fmt: skip
def test_a_rank_knows_its_place(environment, given, rank, local, size):
    environment |= LEFT | given
    name_rank()
    assert (environment["RANK"], environment["LOCAL_RANK"]) == (rank, local)
    assert local_ranks() == size


def test_a_process_of_no_launcher_has_no_rank(environment):
    name_rank()
    assert "RANK" not in environment and "LOCAL_RANK" not in environment
