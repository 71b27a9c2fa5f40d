"""GPT-NeoX on a machine without a GPU.

GPT-NeoX asks `torch.cuda` for devices, tensors and random states by name. Where there is no CUDA
and the settings say `distributed_backend: gloo`, those names are redirected to the CPU. Nothing is
touched where a GPU is visible.
"""

from __future__ import annotations

import os
from importlib import import_module

import torch

from megatron_patch.architecture import SettingsError

_CPU = torch.device("cpu")


def activate_cpu_mode(args) -> None:
    """Redirects `torch.cuda` to the CPU if CUDA is absent and `distributed_backend` is gloo.

    Args:
        args: GPT-NeoX's settings; `num_gpus` is the number of ranks on this machine, by default
            what tensor and pipeline parallelism need.

    Raises:
        SettingsError: a setting that cannot work on a CPU.
    """
    if torch.cuda.is_available() or args.distributed_backend != "gloo":
        return
    if args.precision == "fp16" or (args.fp16 or {}).get("enabled"):
        raise SettingsError("precision: found fp16, wanted fp32 or bfloat16 on the CPU")
    already_active = torch.cuda.current_device is _current_device
    if "LOCAL_RANK" not in os.environ:
        # In the launcher: DeepSpeed's CPU accelerator takes the number of local ranks from
        # LOCAL_SIZE.
        ranks = args.num_gpus or max(args.model_parallel_size, 1) * max(args.pipe_parallel_size, 1)
        os.environ["LOCAL_SIZE"] = str(ranks)
        # Threads that spin while they wait slow each other's work down where cores are few.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    elif not already_active and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // _local_ranks()))
    if already_active:
        return
    if os.environ.get("RANK", "0") == "0":
        print(
            "MetaLA: no CUDA device and distributed_backend: gloo, running on the CPU", flush=True
        )
    _redirect_cuda()
    _avoid_compiled_ops()


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE") or 1)


def _current_device() -> torch.device:
    return _CPU


def _redirect_cuda() -> None:
    def tensor_on_cpu(self: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self

    cuda = torch.cuda
    cuda.current_device = _current_device
    cuda.device_count = _local_ranks
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.LongTensor = torch.LongTensor
    cuda.ByteTensor = torch.ByteTensor
    cuda.FloatTensor = torch.FloatTensor
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    for counter in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    ):
        setattr(cuda, counter, lambda device=None: 0)
    torch.Tensor.cuda = tensor_on_cpu
    torch.nn.Module.cuda = lambda self, device=None: self


def _avoid_compiled_ops() -> None:
    """PyTorch's Adam in place of DeepSpeed's compiled one, which GPT-NeoX builds for
    `cpu_torch_adam` too, and of the CUDA one of `adam`; and none of the all-reduce that DeepSpeed
    would compile for a minute at the first start and use for inference alone."""
    import deepspeed.ops.adam

    deepspeed.ops.adam.DeepSpeedCPUAdam = torch.optim.AdamW
    deepspeed.ops.adam.FusedAdam = torch.optim.AdamW
    # By its full name: the attribute `torch` of `deepspeed.comm` is PyTorch.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None
