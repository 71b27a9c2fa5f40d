"""Where the ranks of a run meet, and what the user's environment says of it.

PyTorch's programs read MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE. `deepy.py` is no rank: it
takes the address alone from the environment, before its setting, and DeepSpeed's launcher sets all
four for the ranks. Its port is 29500 unless `master_port` says another one, so a second run on a
machine fails with "address already in use".
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from itertools import repeat

from megatron_patch.architecture import SettingsError, refuse
from megatron_patch.neox.upstream_fixes.devices import hostfile, others_place_ranks

PORTS = range(20_000, 32_000)  # below those that Linux gives to sockets without one
_DEFAULT_PORT = 29500  # GPT-NeoX's, and DeepSpeed's under MPI


def check_rank(args) -> None:
    """Checks that the launcher's environment is not that of a rank behind the first. Raises a
    SettingsError."""
    if (rank := os.environ.get("RANK", "0")) != "0":
        raise SettingsError(
            f"RANK: found {rank} in the environment, wanted none: deepy.py is started once, and "
            f"starts the ranks itself (now {args.global_num_gpus})"
        )


def settle_port(args, is_given: bool) -> None:
    """Sets `master_port`, which is the user's if `is_given`: to that of MASTER_PORT, or, on this
    machine alone, to a free one. Raises a SettingsError if setting and environment disagree, or
    somebody listens at the port."""
    if args.master_port is None:
        args.master_port, is_given = _DEFAULT_PORT, False
    if not 0 < args.master_port < 2**16:
        refuse("master_port", args.master_port, "the number of a port")
    if args.deepspeed_mpi:  # which overwrites both variables
        _check_mpi(args)
        return
    found = {name: os.environ.get(name.upper()) for name in ("master_port", "master_addr")}
    given = {"master_port": is_given and args.master_port, "master_addr": args.master_addr}
    for name, value in found.items():
        if value and given[name] and str(given[name]) != value:
            wanted = f"{value}, as {name.upper()} says in the environment (or none)"
            refuse(name, given[name], wanted)
    port = found["master_port"]
    if port:
        if not port.isdecimal() or not 0 < int(port) < 2**16:
            refuse("MASTER_PORT", port, "the number of a port")
        args.master_port = int(port)
    if hostfile(args) is not None or others_place_ranks(args):
        return  # the first rank may run on another host
    if not (is_given or port):
        args.master_port = free_port()
    elif not _is_free(args.master_port):
        wanted = "a free port, or none: another process, such as a second run, listens there"
        refuse("master_port", args.master_port, wanted)


def _check_mpi(args) -> None:
    """Checks that nothing is said of port and address, which DeepSpeed chooses under MPI."""
    if (port := args.master_port) != _DEFAULT_PORT:
        refuse("master_port", port, f"none, or {_DEFAULT_PORT}, DeepSpeed's port under MPI")
    if address := args.master_addr:
        refuse("master_addr", address, "none under MPI: DeepSpeed takes that of the first rank")


def free_port(ports: Sequence[int] = PORTS) -> int:
    """Returns one of the ports, by chance, that is still free when its process listens, seconds
    later: systems give none of them to sockets without one."""
    return next(filter(_is_free, map(secrets.choice, repeat(ports))))


def _is_free(port: int) -> bool:
    """Returns whether PyTorch's store can listen at a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
