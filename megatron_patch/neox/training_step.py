"""What makes a training step fast beside the kernels: CUDA graphs of layers, and gradients that are
added to the optimizer's float32 buffers at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from megatron_patch.neox.cuda_graphs import LayerGraphs


def speed_up_steps(is_metala: Callable[[Any], bool], replace: Callable[[Any, Any], None]) -> None:
    from megatron.training import setup_model_and_optimizer

    @functools.wraps(setup_model_and_optimizer)
    def set_up_fast(neox_args, *args, **kwargs):
        result = setup_model_and_optimizer(neox_args, *args, **kwargs)
        if is_metala(neox_args) and result[1] is not None:
            speed_up(result[0], neox_args)
        return result

    replace(setup_model_and_optimizer, set_up_fast)


def speed_up(engine: Any, neox_args: Any) -> None:
    """Prepares a DeepSpeed engine whose model has MetaLA layers."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    from megatron_patch.neox.layer import ParallelMetaLALayer

    accumulators = None
    if isinstance(engine.optimizer, BF16_Optimizer):
        _add_gradients_at_once(engine)
        accumulators = _accumulators(engine.optimizer)
    if not torch.cuda.is_available() or neox_args.distributed_backend == "gloo":
        return
    if (reason := why_no_graphs(neox_args)) is not None:
        _say(f"CUDA graphs off: {reason}")
        return
    layers = [m for m in engine.module.modules() if isinstance(m, ParallelMetaLALayer)]
    graphs = LayerGraphs(layers, accumulators, _say)
    for index, layer in enumerate(layers):
        layer.graphs, layer.index = graphs, index


def why_no_graphs(neox_args: Any) -> str | None:
    """Why a run's layers are not captured, or `None`."""
    import os

    if os.environ.get("METALA_NO_GRAPHS"):
        return "asked"
    zero = neox_args.zero_optimization or {}
    reasons = {
        "model_parallel_size: a capture with NCCL in it has not been checked": (
            neox_args.model_parallel_size > 1
        ),
        "pipe_parallel_size: a stage has several forward passes in flight": (
            neox_args.pipe_parallel_size > 1
        ),
        "checkpoint_activations: layers are computed again in the backward pass": (
            neox_args.checkpoint_activations
        ),
        "hidden_dropout: each replay would have to draw new numbers": neox_args.hidden_dropout > 0,
        "zero_optimization.stage: ZeRO 3 gathers the weights of each layer anew": (
            neox_args.zero_stage == 3
        ),
        "zero_optimization: gradients or weights are offloaded": bool(
            zero.get("cpu_offload") or zero.get("offload_optimizer") or zero.get("offload_param")
        ),
        "log_gradient_noise_scale: it reads the gradients of each micro-batch": (
            neox_args.log_gradient_noise_scale
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _say(line: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(f"MetaLA: {line}", flush=True)


def _add_gradients_at_once(engine: Any) -> None:
    """Without this, DeepSpeed keeps all 16-bit gradients to the end of the backward pass, then
    converts and adds them one by one; its switch `immediate_grad_update` frees each at once."""
    optimizer = engine.optimizer
    if not optimizer.immediate_grad_update:
        optimizer.immediate_grad_update = True
        engine._config.bfloat16_config.immediate_grad_update = True
        optimizer.create_grad_acc_hooks()

    @torch.no_grad()
    def update_in_one_kernel(self, lp, group_idx, param_idx, clear_lp_grads):
        if lp.grad is not None:
            total = self.fp32_groups_gradients[group_idx][param_idx]
            total.add_(lp.grad.view_as(total))
            lp._hp_grad = total
            self.fp32_groups_has_gradients[group_idx][param_idx] = True

    # DeepSpeed joins all gradients in one tensor, rounds it to the dtype of the communication, and
    # copies the sum back, for a single rank too.
    reduce = engine.buffered_allreduce_fallback

    @functools.wraps(reduce)
    def reduce_where_they_lie(grads=None, elements_per_buffer=0):
        if torch.distributed.get_world_size(engine.seq_data_parallel_group) > 1:
            reduce(grads, elements_per_buffer=0)  # each of the few flat tensors alone

    engine.buffered_allreduce_fallback = reduce_where_they_lie
    optimizer._update_hp_grad = MethodType(update_in_one_kernel, optimizer)


def _accumulators(optimizer: Any) -> dict[torch.nn.Parameter, Any]:
    """Where DeepSpeed adds the float32 gradient of each parameter, and how it is told."""

    def done(parameter, total, group, index) -> None:
        parameter._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True

    return {
        parameter: (total, functools.partial(done, parameter, total, group, index))
        for group, parameters in enumerate(optimizer.bf16_groups)
        for index, (parameter, total) in enumerate(
            zip(parameters, optimizer.fp32_groups_gradients[group], strict=True)
        )
    }


def fuse_norm_and_clipping() -> None:
    """DeepSpeed launches a kernel or two for each parameter's norm and another to scale it."""
    from deepspeed.runtime import bf16_optimizer

    get_norm = bf16_optimizer.get_global_norm_of_tensors

    @functools.wraps(get_norm)
    def norm_of_all(input_tensors, norm_type=2, **kwargs):
        tensors = list(input_tensors)
        if norm_type == 2 and tensors:
            tensors = [torch.stack(torch._foreach_norm([t.detach() for t in tensors])).norm()]
        # On the host, where DeepSpeed compares it four times: one wait for the GPU, not four.
        return get_norm(tensors, norm_type=norm_type, **kwargs).cpu()

    def clip_all(input_tensors, max_norm=1.0, global_norm=None, mpu=None, eps=1e-6):
        factor = max_norm / (global_norm + eps)
        if factor < 1:
            torch._foreach_mul_([t.detach() for t in input_tensors], float(factor))
        return global_norm

    bf16_optimizer.get_global_norm_of_tensors = norm_of_all
    bf16_optimizer.clip_tensors_by_global_norm = clip_all


# The parts of a step that GPT-NeoX times.
STEP_TIMERS = ("forward", "backward", "backward-backward", "optimizer", "batch generator")


class _Untimed:
    """Stands for one of GPT-NeoX's timers and does nothing."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def reset(self) -> None: ...


def let_the_host_run_ahead(
    is_metala: Callable[[Any], bool], replace: Callable[[Any, Any], None]
) -> None:
    """Takes away GPT-NeoX's waits for the GPU within a step, during which the host launches nothing.

    It waits at each start and stop of a timer, and for the sizes of a batch, which it broadcasts to
    a tensor-parallel group of one rank too. Here the parts of a step are timed only where
    `wall_clock_breakdown` asks for it, and a single rank keeps its batch.
    """
    from megatron import mpu
    from megatron.training import train
    from megatron.utils import Timers

    broadcast, log, write = mpu.broadcast_data, Timers.log, Timers.write

    @functools.wraps(broadcast)
    def broadcast_to_others(keys, data, datatype):
        if mpu.get_model_parallel_world_size() > 1 or not torch.cuda.is_available():
            return broadcast(keys, data, datatype)
        for key in keys:
            assert data[key].dtype == datatype, f"{key}: found {data[key].dtype}, wanted {datatype}"
        return {key: data[key].cuda(non_blocking=True) for key in keys}

    @functools.wraps(train)
    def train_ahead(neox_args, timers, *args, **kwargs):
        if is_metala(neox_args) and not neox_args.wall_clock_breakdown:
            timers.timers.update({name: _Untimed() for name in STEP_TIMERS})
            _say("the parts of a step are not timed; wall_clock_breakdown: true times them")
        return train(neox_args, timers, *args, **kwargs)

    def timed(self, names) -> list[str]:
        return [name for name in names if not isinstance(self.timers[name], _Untimed)]

    def log_timed(self, names, normalizer=1.0, reset=True):
        if names := timed(self, names):
            log(self, names, normalizer, reset)

    def write_timed(self, names, iteration, normalizer=1.0, reset=False):
        write(self, timed(self, names), iteration, normalizer, reset)

    Timers.log, Timers.write = log_timed, write_timed
    replace(broadcast, broadcast_to_others)
    replace(train, train_ahead)
