"""Makes a training step as fast as its kernels: the host gets out of the way.

- Layers are launched as CUDA graphs (`cuda_graphs.py`).
- DeepSpeed leaves the gradients of a single data-parallel rank where they are. Its bfloat16
  optimizer adds each gradient to its sum at once and in one kernel (`gradient_sums.py`), in
  bfloat16 where it is the only one of a step (`gradient_dtype.py`),
  averages the sums over ranks during the backward pass (`overlapped_reduction.py`), and clips and
  updates in one kernel, for whose norm the host does not wait (`optimizer_step.py`).
- GPT-NeoX no longer waits for the GPU between the parts of a step, nor for the values that it logs
  (`late_logging.py`).
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any

import torch

from megatron_patch.architecture import MetaLAOptions
from megatron_patch.neox.cuda_graphs import LayerGraphs, decide_alone
from megatron_patch.neox.gradient_dtype import single_gradients_in_bfloat16
from megatron_patch.neox.gradient_sums import add_gradients_at_once
from megatron_patch.neox.late_logging import log_late
from megatron_patch.neox.notices import say
from megatron_patch.neox.optimizer_step import OptimizerStep, is_adamw
from megatron_patch.neox.overlapped_reduction import BUCKET, OverlappedReduction, why_no_overlap
from megatron_patch.neox.patching import in_metala_runs, overrides, replaces
from megatron_patch.neox.skipped_steps import SkippedSteps
from megatron_patch.neox.token_groups import deciding_together, layer_group
from megatron_patch.neox.upstream_fixes.cpu_mode import runs_on_cpu

# The parts of a step that GPT-NeoX times.
STEP_TIMERS = ("forward", "backward", "backward-backward", "optimizer", "batch generator")


def speed_up_steps() -> None:
    """Hooks everything of this module into GPT-NeoX."""
    from megatron.training import setup_model_and_optimizer

    @in_metala_runs(setup_model_and_optimizer)
    def set_up_fast(setup, neox_args, *args, **kwargs):
        with single_gradients_in_bfloat16(neox_args):
            engine, optimizer, *others = setup(neox_args, *args, **kwargs)
        if optimizer is not None:
            prepare_engine(engine, neox_args)
        return engine, optimizer, *others

    _let_the_host_run_ahead()
    log_late()
    _keep_the_batch_of_a_single_rank()


def prepare_engine(engine: Any, neox_args: Any) -> None:
    """Prepares a DeepSpeed engine that trains a model with MetaLA layers."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    from megatron_patch.neox.layer import ParallelMetaLALayer

    _reduce_gradients_in_place(engine)
    time_only_where_asked(engine, neox_args)
    sums, skipped = None, SkippedSteps(say)
    is_bfloat16 = isinstance(engine.optimizer, BF16_Optimizer)
    if is_bfloat16:
        overlapped = _average_during_backward(engine, neox_args)
        sums = add_gradients_at_once(engine, overlapped.note if overlapped else None)
    # With experts, norms are over other ranks.
    if is_bfloat16 and is_adamw(engine.optimizer.optimizer) and not engine.has_moe_layers:
        OptimizerStep(engine, skipped)
    elif neox_args.precision != "fp16":  # for which GPT-NeoX counts skipped steps itself
        skipped.watch(engine)
    if runs_on_cpu(neox_args):
        return
    if (reason := why_no_graphs(neox_args)) is not None:
        say(f"CUDA graphs off: {reason}")
        return
    layers = [m for m in engine.module.modules() if isinstance(m, ParallelMetaLALayer)]
    group = layer_group()
    decide = decide_alone if group is None else deciding_together(group)
    graphs = LayerGraphs(layers, sums, say, decide)
    if group is not None:
        atexit.register(graphs.release)
    for index, layer in enumerate(layers):
        layer.graphs, layer.index = graphs, index


def time_only_where_asked(engine: Any, neox_args: Any) -> None:
    """Lets a DeepSpeed engine wait for the GPU at both ends of a step, in order to time it, only
    with `wall_clock_breakdown`."""
    engine.tput_timer.config.synchronized = neox_args.wall_clock_breakdown


def why_no_graphs(neox_args: Any) -> str | None:
    """Returns why the layers of a run are not captured, or `None`."""
    options, zero = MetaLAOptions.parse(neox_args.metala), neox_args.zero_optimization or {}
    offloads = ("cpu_offload", "offload_optimizer", "offload_param")
    reasons = {
        "metala.cuda_graphs is never": options.cuda_graphs == "never",
        "model_parallel_size and metala.context_parallel_size are above 1, and captures of "
        "collectives of two groups have not been tested": (
            neox_args.model_parallel_size > 1 and options.context_parallel_size > 1
        ),
        "pipe_parallel_size is above 1, and a stage has several micro-batches in flight": (
            neox_args.pipe_parallel_size > 1
        ),
        "checkpoint_activations computes layers again in the backward pass": (
            neox_args.checkpoint_activations
        ),
        "hidden_dropout is above 0, and random numbers in graphs have not been tested": (
            neox_args.hidden_dropout > 0
        ),
        "zero_optimization.stage is 3, which gathers the weights for each layer": (
            zero.get("stage") == 3
        ),
        "zero_optimization offloads to the CPU, which has not been tested": any(
            zero.get(name) for name in offloads
        ),
        "log_gradient_noise_scale reads each micro-batch's gradients from the parameters": (
            neox_args.log_gradient_noise_scale
        ),
        "train_impl is not normal, and captures beside a reference model have not been tested": (
            neox_args.train_impl != "normal"
        ),
        "torch runs on ROCm, where captures have not been tested": torch.version.hip is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


# ---- DeepSpeed's bfloat16 optimizer, which keeps float32 sums of gradients in flat tensors


def _reduce_gradients_in_place(engine: Any) -> None:
    """Reduces gradients over data-parallel ranks without joining them first, where that can be.

    DeepSpeed concatenates all gradients, rounds them to the dtype of the communication and copies
    them back, for a single rank too, which has nothing to reduce. The bfloat16 optimizer's
    gradients lie in a few flat tensors, each a bucket of its own.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    is_flat = isinstance(engine.optimizer, BF16_Optimizer)

    @overrides(engine, "buffered_allreduce_fallback")
    def reduce_each(reduce: Callable, grads=None, elements_per_buffer: int = 500_000_000) -> None:
        if torch.distributed.get_world_size(engine.seq_data_parallel_group) > 1:
            reduce(grads, 0 if is_flat else elements_per_buffer)


def _average_during_backward(engine: Any, neox_args: Any) -> OverlappedReduction | None:
    """Overlaps the averages over data-parallel ranks with the backward pass, where that can be."""
    zero = neox_args.zero_optimization or {}
    if torch.distributed.get_world_size(engine.seq_data_parallel_group) == 1:
        return None
    if (reason := why_no_overlap(neox_args)) is not None:
        if zero.get("overlap_comm"):
            say(f"gradients are averaged after the backward pass: {reason}")
        return None
    overlapped = OverlappedReduction(engine, zero.get("reduce_bucket_size", BUCKET))
    overrides(engine, "buffered_allreduce_fallback")(lambda _, **__: overlapped.finish())
    return overlapped


# ---- GPT-NeoX's waits for the GPU, during which the host launches nothing


class _Untimed:
    """Stands in for a timer of GPT-NeoX and does nothing."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def reset(self) -> None: ...


def _let_the_host_run_ahead() -> None:
    """Times the parts of a step only where `wall_clock_breakdown` asks for it, and lets the host
    learn of the last step before training ends, also by `exit_interval`.

    GPT-NeoX waits for the GPU at each start and stop of its timers, ten times a step, and the GPU
    then waits for the next launch.
    """
    from megatron.training import train
    from megatron.utils import Timers

    @in_metala_runs(train)
    def train_ahead(train, neox_args, timers, model, *args, **kwargs):
        if not (neox_args.wall_clock_breakdown or runs_on_cpu(neox_args)):
            timers.timers.update({name: _Untimed() for name in STEP_TIMERS})
            say("the parts of a step are not timed, which would make the GPU wait; "
                "wall_clock_breakdown: true times them")  # fmt: skip
        settle = getattr(model, "settle", lambda: None)
        try:
            iteration = train(neox_args, timers, model, *args, **kwargs)
        except SystemExit:
            settle()
            raise
        settle()
        return iteration

    def timed(timers, names) -> list[str]:
        return [name for name in names if not isinstance(timers.timers[name], _Untimed)]

    @overrides(Timers, "log")
    def log_timed(log, self, names, **options):
        if names := timed(self, names):
            log(self, names, **options)

    @overrides(Timers, "write")
    def write_timed(write, self, names, **options):
        write(self, timed(self, names), **options)


def _keep_the_batch_of_a_single_rank() -> None:
    """Copies a batch to the GPU without waiting where no tensor-parallel rank needs it.

    GPT-NeoX broadcasts a batch and its sizes to a group of one rank too, and waits for the sizes.
    """
    from megatron import mpu

    @replaces(mpu.broadcast_data)
    def copy_or_broadcast(broadcast, keys, data, datatype):
        alone = mpu.get_model_parallel_world_size() == 1 and torch.cuda.is_available()
        if not alone or any(data[key].dtype != datatype for key in keys):
            return broadcast(keys, data, datatype)
        return {key: data[key].cuda(non_blocking=True) for key in keys}
