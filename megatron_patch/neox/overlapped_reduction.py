"""Averages gradients over data-parallel ranks while the backward pass goes on.

`zero_optimization: {overlap_comm: true}` asks for that, but DeepSpeed's bfloat16 optimizer averages
its float32 sums of gradients only after the backward pass. Here they are cut into buckets of
neighbouring parameters, as PyTorch's DDP does. Once the last micro-batch has added to all of a
bucket, the bucket is averaged on a stream of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_patch.neox.token_groups import is_sequence_parallel

BUCKET = 32 * 2**20  # elements: two or three layers of 0.38B, 64 MiB in bfloat16


@dataclass
class Bucket:
    """Parameters whose sums of gradients are neighbours in memory.

    Attributes:
        sums: their sums of gradients, as one flat tensor.
        first: the place of the first of them in the model.
        missing: those whose gradient the last micro-batch has not added yet.
    """

    parameters: list[nn.Parameter]
    sums: Tensor
    first: int

    def __post_init__(self) -> None:
        self.missing = set(self.parameters)


def why_no_overlap(neox_args: Any) -> str | None:
    """Returns why gradients are averaged after the backward pass, or `None`."""
    reasons = {
        "zero_optimization.overlap_comm is not true": (
            not (neox_args.zero_optimization or {}).get("overlap_comm")
        ),
        "pipe_parallel_size is above 0: a pipeline does not say which micro-batch is the last": (
            neox_args.pipe_parallel_size > 0
        ),
        "sequence_parallel is true: tensor-parallel ranks add up gradients first": (
            is_sequence_parallel(neox_args)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class OverlappedReduction:
    """The buckets of a DeepSpeed engine with the bfloat16 optimizer.

    All ranks average the buckets in one order, that of the backward pass through the model.

    Args:
        bucket_size: largest number of elements of a bucket; a larger parameter is one of its own.
    """

    def __init__(self, engine: Any, bucket_size: int):
        self.engine = engine
        self.buckets = _cut(engine, min(bucket_size, BUCKET))
        self.bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self.started = 0  # buckets of this step, from the first on
        is_on_gpu = self.buckets[0].sums.is_cuda
        self.stream = torch.cuda.Stream() if is_on_gpu else None

    def note(self, parameter: nn.Parameter) -> None:
        """Is called when a micro-batch's gradient has been added to a parameter's sum.

        Raises:
            RuntimeError: that sum has been averaged already in this step.
        """
        if not self.engine.is_gradient_accumulation_boundary():
            return
        bucket = self.bucket_of[parameter]
        if parameter not in bucket.missing:
            raise RuntimeError(
                "zero_optimization.overlap_comm: found two gradients of a parameter of shape "
                f"{list(parameter.shape)} in one backward pass, wanted one; set it to false"
            )
        bucket.missing.remove(parameter)
        while self.started < len(self.buckets) and not self.buckets[self.started].missing:
            self._start()

    def finish(self) -> None:
        """Averages what is left, and lets the current stream wait for all averages."""
        while self.started < len(self.buckets):
            self._start()
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        self.started = 0
        for bucket in self.buckets:
            bucket.missing = set(bucket.parameters)

    def _start(self) -> None:
        sums = self.buckets[self.started].sums
        self.started += 1
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # the current one where it is `None`, on the CPU
            average_over_ranks(self.engine, sums)


def average_over_ranks(engine: Any, sums: Tensor) -> None:
    """Averages sums over a DeepSpeed engine's data-parallel ranks, in place, as its
    `allreduce_bucket` does, in the dtype and with the factors of its settings. That one passes over
    the sums six times where two are enough."""
    ranks = torch.distributed.get_world_size(engine.seq_data_parallel_group)
    before, after = 1.0, 1.0
    if engine.gradient_average:
        before = 1 / (engine.gradient_predivide_factor() if engine.postscale_gradients() else ranks)
        after = 1 / (before * ranks)
    dtype = engine.communication_data_type
    message = sums if dtype == sums.dtype else torch.empty_like(sums, dtype=dtype)
    if message is not sums or before != 1:
        torch.mul(sums, before, out=message)
    torch.distributed.all_reduce(message, group=engine.seq_data_parallel_group)
    if message is not sums or after != 1:
        torch.mul(message, after, out=sums)


def _cut(engine: Any, bucket_size: int) -> list[Bucket]:
    """Returns the buckets in the order in which the backward pass completes them."""
    optimizer = engine.optimizer
    place = {p: number for number, p in enumerate(engine.module.parameters())}
    buckets = []
    for parameters, flat in zip(
        optimizer.bf16_groups, optimizer.fp32_groups_gradients_flat, strict=True
    ):
        start, taken = 0, []
        for p, after in zip(parameters, [*parameters[1:], None], strict=True):
            taken.append(p)
            count = sum(q.numel() for q in taken)
            if after is None or count + after.numel() > bucket_size:
                first = min(place[q] for q in taken)
                buckets.append(Bucket(taken, flat[start : start + count], first))
                start, taken = start + count, []
    return sorted(buckets, key=lambda bucket: bucket.first, reverse=True)
