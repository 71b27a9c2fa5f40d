"""One tensor-parallel rank of a GPT-NeoX model on the CPU: builds the model as training does, loads
the rank's own checkpoint files, and runs it on given tokens. Started by `convert.verify`, with
GPT-NeoX on the path:

RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 python -m convert.neox_logits WORK_FOLDER
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import torch

from convert.torch_file import load_torch_file
from megatron_patch.architecture_neox import expand_attention_config


def rank_tensors(step: Path, form: str, rank: int) -> dict[int, dict]:
    """The state of each layer on a rank, by layer index, from the rank's own files."""
    if form == "pipeline":
        files = step.glob(f"layer_*-model_{rank:02d}-model_states.pt")
        return {int(re.match(r"layer_(\d+)", f.name)[1]): load_torch_file(f) for f in files}
    if form == "ZeRO 3":
        module = zero3_tensors(step)
    else:
        module = load_torch_file(step / f"mp_rank_{rank:02d}_model_states.pt")["module"]
    layers: dict[int, dict] = {}
    for name, tensor in module.items():
        _, layer, rest = name.split(".", 2)
        layers.setdefault(int(layer), {})[rest] = tensor
    return layers


def zero3_tensors(step: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of ZeRO stage 3, joined by DeepSpeed's own code, which does not
    read the files here: it would run what is in them. In their dtypes of the training."""
    from deepspeed.utils import zero_to_fp32

    def of_all_ranks(kind: str) -> list:
        files = step.glob(f"*zero_pp_rank_*_mp_rank_00_{kind}_states.pt")
        in_order = sorted(files, key=lambda file: int(re.search(r"pp_rank_(\d+)", file.name)[1]))
        return [load_torch_file(file) for file in in_order]

    states = of_all_ranks("model")
    flat = [held["optimizer_state_dict"]["fp32_flat_groups"] for held in of_all_ranks("optim")]
    described = [
        zero_to_fp32.zero_model_state(
            buffers={},
            param_shapes=held["param_shapes"],
            shared_params=[],
            ds_version=held["ds_version"],
            frozen_param_shapes=None,
            frozen_param_fragments=None,
        )
        for held in states
    ]
    joined = zero_to_fp32._get_fp32_state_dict_from_zero3_checkpoint(
        len(states), flat, described, exclude_frozen_parameters=True
    )
    dtypes = {name: tensor.dtype for name, tensor in states[0]["module"].items()}
    return {name: tensor.contiguous().detach().to(dtypes[name]) for name, tensor in joined.items()}


# Kernels for GPUs alone; what they compute is the same.
GPU_FUSIONS = (
    "rmsnorm_fusion",
    "rope_fusion",
    "scaled_masked_softmax_fusion",
    "scaled_upper_triang_masked_softmax_fusion",
    "use_flashattn_swiglu",
)


def build_model(settings: dict, ranks: int, padded_vocab_size: int, length: int) -> torch.nn.Module:
    """The run's model on this rank, all stages of a pipeline in one: GPT-NeoX's own classes, from
    those of the run's settings that describe a model, in float32.

    Args:
        settings: the run's.
        ranks: number of tensor-parallel ranks.
        padded_vocab_size: rows of the embedding over all ranks.
        length: of the sequences it will run on.
    """
    import megatron  # noqa: F401  (a linked checkout registers MetaLA here)

    import megatron_patch.neox

    megatron_patch.neox.register()

    import deepspeed
    from megatron import mpu
    from megatron.initialize import initialize_megatron
    from megatron.model.gpt2_model import GPT2ModelPipe
    from megatron.neox_arguments import NeoXArgs
    from megatron.neox_arguments.neox_args import NeoXArgsModel

    of_model = {
        key: value
        for key, value in settings.items()
        if key in NeoXArgsModel.__dataclass_fields__ and value is not None
    }
    # Operator and attention are those for the CPU.
    metala = {**(settings.get("metala") or {}), "backend": "auto"}
    layer_types = expand_attention_config(settings["attention_config"], settings["num_layers"])
    attention_config = ["global" if kind == "flash" else kind for kind in layer_types]
    neox_args = NeoXArgs(
        **{
            **of_model,
            "metala": metala,
            "attention_config": attention_config,
            **dict.fromkeys(GPU_FUSIONS, False),
            "precision": "fp32",
            "seq_length": length,
            "max_position_embeddings": length,
            "model_parallel_size": ranks,
            "pipe_parallel_size": 0,
            "global_num_gpus": ranks,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "train_iters": 1,
            "optimizer": {"type": "cpu_torch_adam", "params": {"lr": 1e-4}},
            "distributed_backend": "gloo",
            "use_wandb": False,
            "lazy_mpu_init": True,  # else the data set helper would be compiled
        }
    )
    neox_args.padded_vocab_size = padded_vocab_size
    deepspeed.init_distributed(dist_backend="gloo")
    neox_args.configure_distributed_args()
    initialize_megatron(neox_args, allow_no_cuda=True)()
    neox_args.use_cpu_initialization = False  # `lazy_mpu_init` sets it; it needs more memory
    return GPT2ModelPipe(neox_args, parallel_output=False, topology=mpu.get_topology())


def load(model: torch.nn.Module, layers: dict[int, dict]) -> None:
    """Loads each layer strictly.

    Raises:
        RuntimeError: a tensor is missing, unexpected or of another shape.
    """
    for index, module in enumerate(model.forward_funcs):
        state = layers.pop(index, {})
        if isinstance(module, torch.nn.Module):
            module.load_state_dict(state, strict=True)
        elif state:
            raise RuntimeError(f"layer {index} has no tensors in GPT-NeoX, found {sorted(state)}")
    if layers:
        raise RuntimeError(f"GPT-NeoX's model has no layers {sorted(layers)}")


def main() -> None:
    work = Path(sys.argv[1])
    job = json.loads((work / "job.json").read_text())
    rank, ranks = int(os.environ["RANK"]), job["ranks"]
    # A file to meet at needs no port that another run might take.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{work / 'meeting'}", rank=rank, world_size=ranks
    )
    layers = rank_tensors(Path(job["step"]), job["form"], rank)
    vocabulary = layers[0]["word_embeddings.weight"].shape[0] * ranks
    tokens = torch.load(work / "tokens.pt", weights_only=True)
    model = build_model(job["settings"], ranks, vocabulary, tokens.shape[1])
    load(model, layers)

    from megatron.utils import get_ltor_masks_and_position_ids

    mask, _, positions = get_ltor_masks_and_position_ids(
        tokens, eod_token=0, eod_mask_loss=False, sliding_window_width=None
    )
    model.eval()
    with torch.no_grad():
        logits = model((tokens, positions, mask))
    if rank == 0:
        torch.save(logits, work / "logits.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
