"""Ranks over gloo, forked from the test's process: for what several ranks compute together."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.neox.training import free_port


def on_ranks(count: int, code: Callable[[int], Any]) -> list[Any]:
    """Runs `code(rank)` on each rank and returns what they return, by rank. A rank that fails fails
    the test."""
    context = multiprocessing.get_context("fork")
    store = f"tcp://127.0.0.1:{free_port()}"
    results = context.Queue()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            dist.init_process_group("gloo", store, rank=rank, world_size=count)
            result = code(rank)
            dist.destroy_process_group()
            results.put((rank, result, None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))

    processes = [context.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    found = {}
    try:
        for _ in processes:
            rank, found[rank], failure = results.get(timeout=120)
            assert failure is None, f"rank {rank}: {failure}"
    finally:
        for process in processes:
            process.kill() if len(found) < count else process.join()
    return [found[rank] for rank in range(count)]
