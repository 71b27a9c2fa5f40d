"""GPT-NeoX on a machine without a GPU.

GPT-NeoX calls `torch.cuda` for devices, tensors and random states. Where no CUDA device is visible
to `deepy.py` and the settings say `distributed_backend: gloo`, this module redirects those calls to
the CPU. Nothing changes where a GPU is visible.
"""

from __future__ import annotations

import os
from importlib import import_module

import torch

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.notices import say
from megatron_patch.neox.patching import repairs, replaces
from megatron_patch.neox.pytorch_adam import FusedAdamW
from megatron_patch.neox.this_process import in_launcher

ACCELERATOR = "DS_ACCELERATOR"  # the variable that names DeepSpeed's accelerator
_CPU = torch.device("cpu")


def runs_on_cpu(args) -> bool:
    """Returns whether a run asks for gloo and no CUDA device is visible, or was to the launcher."""
    is_cpu = os.environ.get(ACCELERATOR) == "cpu" or not torch.cuda.is_available()
    return args.distributed_backend == "gloo" and is_cpu


# megatron/initialize.py:44. https://github.com/EleutherAI/gpt-neox/issues/580 asks for it.
@repairs("start without CUDA", "megatron.initialize:initialize_megatron", "Megatron requires CUDA")
def initialize_without_cuda() -> None:
    """Tells `initialize_megatron`, which asserts CUDA, that a run on the CPU needs none."""
    from megatron.initialize import initialize_megatron

    @replaces(initialize_megatron)
    def initialize_anywhere(initialize, neox_args, allow_no_cuda=False):
        return initialize(neox_args, allow_no_cuda=allow_no_cuda or runs_on_cpu(neox_args))


def activate_cpu_mode(args) -> None:
    """Redirects `torch.cuda` to the CPU for a run on the CPU. The setting `num_gpus` is the number
    of ranks on this machine, by default as many as tensor and pipeline parallelism need. Raises a
    SettingsError if the precision is fp16, which the CPU does not have."""
    if not runs_on_cpu(args):
        return
    if args.precision == "fp16" or (args.fp16 or {}).get("enabled"):
        raise SettingsError("precision: found fp16, wanted fp32 or bfloat16 on the CPU")
    # DeepSpeed's launcher shows its ranks the GPUs that the user has hidden.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    already_active = torch.cuda.current_device is _current_device
    if in_launcher():
        # DeepSpeed's CPU accelerator reads the number of local ranks from LOCAL_SIZE.
        ranks = args.num_gpus or max(args.model_parallel_size, 1) * max(args.pipe_parallel_size, 1)
        os.environ["LOCAL_SIZE"] = str(ranks)
        # Threads that spin while they wait slow the others down where cores are few.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        # glibc gives large blocks back to the system, which clears their pages for the next step.
        for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            os.environ.setdefault(name, str(2**32 - 1))
        os.environ[ACCELERATOR] = "cpu"  # for the ranks
    elif not already_active and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks()))
    if already_active:
        return
    say("no CUDA device and distributed_backend: gloo, running on the CPU")
    _redirect_cuda()
    _avoid_compiled_ops()


def local_ranks() -> int:
    """Returns the number of ranks on this host, from the variables that launchers set."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE") or 1)


def _current_device() -> torch.device:
    return _CPU


def _redirect_cuda() -> None:
    cuda = torch.cuda
    cuda.current_device = _current_device
    cuda.device_count = local_ranks
    # PyTorch derives this from the count. A loader would pin its batches, which needs a GPU.
    cuda.is_available = lambda: False
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.LongTensor = torch.LongTensor
    cuda.ByteTensor = torch.ByteTensor
    cuda.FloatTensor = torch.FloatTensor
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    for counter in ("memory_allocated", "memory_reserved"):
        setattr(cuda, counter, lambda device=None: 0)
        setattr(cuda, f"max_{counter}", lambda device=None: 0)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, device=None: self


def _avoid_compiled_ops() -> None:
    """Puts PyTorch's fused AdamW in place of DeepSpeed's compiled Adams.

    GPT-NeoX builds the CPU one for `cpu_torch_adam`, and the CUDA one for `adam`. Also stops
    DeepSpeed from compiling its shared-memory all-reduce, which takes a minute at the first start
    and serves inference alone.
    """
    import deepspeed.ops.adam

    deepspeed.ops.adam.DeepSpeedCPUAdam = FusedAdamW
    deepspeed.ops.adam.FusedAdam = FusedAdamW
    # By its full name: the attribute `torch` of `deepspeed.comm` is PyTorch.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None
