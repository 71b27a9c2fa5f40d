"""A watchdog that ends a run, and names the rank, when a rank no longer answers or trains.

A stopped process, a host that hangs or a file system that does not answer leaves all other ranks
waiting. PyTorch's time limits, where there are any, name the ranks that wait. So a thread in each
rank counts its signs of life and its work in the store that torch.distributed keeps on rank 0. Rank
0 watches the others by these counts; the others watch whether rank 0 answers.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.patching import in_metala_runs, repairs, replaces

VARIABLE = "METALA_WATCHDOG_SECONDS"
DEFAULT_SECONDS = 1800.0
_LEFT = 2**40  # what a rank adds to its signs of life when its work is over


@repairs("watchdog", "megatron.training:pretrain")
def watch_ranks() -> None:
    """Gives trainings a watchdog."""
    from megatron import text_generation_utils, training

    watchdog: Watchdog | None = None
    is_training = False  # generation and evaluation have no watchdog

    @in_metala_runs(training.initialize_megatron)
    def initialize_and_watch(initialize, neox_args, *args, **kwargs):
        nonlocal watchdog
        result = initialize(neox_args, *args, **kwargs)
        if is_training and (seconds := watchdog_seconds()):
            watchdog = Watchdog(_connect, dist.get_rank(), dist.get_world_size(), seconds)
        return result

    @in_metala_runs(training.pretrain)
    def pretrain_watched(pretrain, neox_args):
        nonlocal is_training, watchdog
        is_training = True
        try:
            pretrain(neox_args)
        finally:
            is_training = False
            if watchdog:
                watchdog.leave()
            watchdog = None

    def count(work, *args, **kwargs):
        if watchdog:
            watchdog.work()
        return work(*args, **kwargs)

    steps = (training.train_step, training.forward_step, text_generation_utils.forward_model)
    for work in (*steps, training.save_checkpoint):
        replaces(work)(count)


def watchdog_seconds() -> float | None:
    """Returns the time limit of the environment in seconds, `None` for no watchdog. Raises a
    SettingsError if the variable holds no number of seconds."""
    text = os.environ.get(VARIABLE) or str(DEFAULT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < 1e9:
        raise SettingsError(
            f"{VARIABLE}: found {text!r}, wanted a number of seconds, or 0 for none"
        )
    return seconds or None


def _connect() -> dist.TCPStore:
    """Opens a connection of the watchdog's own. A connection that waits for an answer blocks all
    other questions."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False)


class Watchdog:
    """Ends this process with exit code 1 when a rank has given no sign of life for `seconds`, or,
    once the ranks train, when no rank has got on for as long. A line names the rank after a sixth
    of that time, and another one at the end. `connect` opens a connection to the store on rank
    0."""

    def __init__(self, connect: Callable[[], Any], rank: int, world_size: int, seconds: float):
        self._connect, self._rank, self._seconds = connect, rank, seconds
        self._pause = min(5.0, seconds / 10)
        self._done, self._is_over, self._is_said = 0, threading.Event(), False
        self._answered = time.monotonic()  # when the store last answered
        # The last count of each rank and kind, and when it was first seen.
        kinds = [(rank, kind) for rank in range(world_size) for kind in ("life", "work")]
        self._seen = {key: (0, self._answered) for key in kinds}
        self._counter = threading.Thread(target=self._count, daemon=True)
        self._counter.start()
        if rank:
            threading.Thread(target=self._await_rank_0, daemon=True).start()

    def work(self) -> None:
        """Counts a new piece of work: a step, a micro-batch, a checkpoint."""
        self._done += 1

    def leave(self) -> None:
        """Ends the watch when this rank's work is over. It waits for the counting thread, because
        Python aborts if it ends while a thread is in the store."""
        self._is_over.set()
        self._counter.join(timeout=60)

    def _count(self) -> None:
        told = 0
        try:
            store = self._connect()
            store.set(f"metala/host/{self._rank}", socket.gethostname())
            is_over = False
            while not is_over:
                is_over, done = self._is_over.wait(self._pause), self._done
                store.add(f"metala/life/{self._rank}", _LEFT if is_over else 1)
                store.add(f"metala/work/{self._rank}", done - told)
                told = done
                if self._rank == 0:
                    self._judge(store)
                elif store.check(["metala/verdict"]):
                    os._exit(1)
                self._answered = time.monotonic()
        except RuntimeError:  # rank 0 has left or is lost; `_await_rank_0` finds out which
            pass

    def _judge(self, store: Any) -> None:
        now = time.monotonic()
        for (rank, kind), (count, since) in self._seen.items():
            found = store.add(f"metala/{kind}/{rank}", 0)
            self._seen[rank, kind] = (found, since if found == count else now)
        present = [r for (r, kind), (n, _) in self._seen.items() if kind == "life" and n < _LEFT]
        life = {rank: now - self._seen[rank, "life"][1] for rank in present}
        work = {rank: now - self._seen[rank, "work"][1] for rank in present}
        done = {rank: self._seen[rank, "work"][0] for rank in present}
        if not present:
            return
        if (age := max(life.values())) > self._seconds / 6:
            who = [rank for rank in present if life[rank] > self._seconds / 6]
            what = f"no sign of life for {age:.0f} s from {_named(who, store)}"
        elif any(done.values()):
            age = min(work.values())
            who = [rank for rank in present if done[rank] == min(done.values())]
            what = f"no rank has got on for {age:.0f} s, behind is {_named(who, store)}"
        else:
            age, what = 0.0, ""  # the ranks still read data, which may take any time
        if self._is_too_long(age, what, is_speaker=True):
            store.set("metala/verdict", "")
            time.sleep(2 * self._pause)
            os._exit(1)

    def _await_rank_0(self) -> None:
        is_speaker = self._rank == 1 or os.environ.get("LOCAL_RANK") == "0"
        while not self._is_over.wait(self._pause):
            age = time.monotonic() - self._answered
            what = f"no sign of life for {age:.0f} s from rank 0 on {os.environ.get('MASTER_ADDR')}"
            if self._is_too_long(age, what, is_speaker):
                time.sleep(0 if is_speaker else 2 * self._pause)
                os._exit(1)

    def _is_too_long(self, age: float, what: str, is_speaker: bool) -> bool:
        is_end, is_warning = age > self._seconds, age > self._seconds / 6
        if is_speaker and (is_end or (is_warning and not self._is_said)):
            outlook = "the run ends" if is_end else f"the run ends at {self._seconds:.0f} s"
            print(f"MetaLA: {what}; {outlook} ({VARIABLE})", flush=True)
        self._is_said = is_warning
        return is_end


def _named(ranks: Iterable[int], store: Any) -> str:
    def host(rank: int) -> str:
        key = f"metala/host/{rank}"
        return store.get(key).decode() if store.check([key]) else "an unknown host"

    return ", ".join(f"rank {rank} on {host(rank)}" for rank in ranks)
