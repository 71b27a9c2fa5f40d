"""Verifying an export: the logits of GPT-NeoX's own model and of the Hugging Face model.

The GPT-NeoX model is the oracle, and shares no code with the converter's merging. Each
tensor-parallel rank is a process (`python -m convert.verify WORK_FOLDER`, with GPT-NeoX on the
path) that builds the tensor-parallel model and loads its own files, as in training. Pipeline stages
run one after the other in that process, and DeepSpeed's own code joins ZeRO stage 3. Both models
compute in float32 on the CPU, so that an export which keeps the weights' dtype must agree to
float32's accuracy.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from convert.command import ROOT, ConvertError
from convert.files import load_torch_file
from convert.neox_reader import NeoXCheckpoint
from megatron_patch.architecture_neox import expand_attention_config

BATCH, LENGTH = 2, 160  # two chunks of the operator and a part of a third
# The largest difference allowed if the weights kept their dtype is TOLERANCE. Deep models amplify
# rounding beyond that: the logits of a new 0.38B model move by 2e-4 when the last bits of its
# embedding change. So the limit rises to TIMES_ROUNDING times the effect of those bits on this very
# model, but at most to ROUNDING_SHARE of the largest logit. Wrong weights change far more.
TOLERANCE = 1e-4
TIMES_ROUNDING, ROUNDING_SHARE = 4, 1e-2
# The limit if the weights were rounded to a smaller dtype, as a share of the largest logit.
SHARE_OF_LARGEST_LOGIT = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Fused kernels that only run on GPUs; the model computes the same without them.
GPU_FUSIONS = """
    rmsnorm_fusion rope_fusion scaled_masked_softmax_fusion
    scaled_upper_triang_masked_softmax_fusion use_flashattn_swiglu
""".split()


@dataclass(frozen=True)
class Comparison:
    """The result of a verification."""

    largest_difference: float
    tolerance: float
    largest_logit: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest_difference:.2e} "
            f"(allowed {self.tolerance:.1e}, largest logit {self.largest_logit:.2f}, "
            f"{self.tokens} tokens)"
        )

    @property
    def is_equal(self) -> bool:
        return self.largest_difference <= self.tolerance  # False for NaN


def verify(
    neox: Path, source: NeoXCheckpoint, folder: Path, tokens: int, rounded_to: torch.dtype | None
) -> Comparison:
    """Compares a folder with the checkpoint that it was exported from. Raises a ConvertError if the
    two differ, or one of them cannot be run.

    Args:
        neox: the GPT-NeoX checkout, linked to the plugin or not.
        source: the checkpoint; only its settings and the place of its files are used.
        folder: the Hugging Face folder.
        tokens: number of tokens of the tokenizer.
        rounded_to: the dtype that weights were rounded to, `None` if they kept theirs.
    """
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(tokens, (BATCH, LENGTH), generator=generator)
    with tempfile.TemporaryDirectory(prefix="verify-") as work:
        expected = _neox_logits(neox, source, token_ids, Path(work))
    found, rounding = _hf_logits(folder, token_ids, source.shape.rewards)
    comparison = compare(expected[..., : found.shape[-1]], found, rounding, rounded_to)
    if not comparison.is_equal:
        raise ConvertError(f"not equal to the GPT-NeoX model: {comparison}")
    return comparison


def compare(
    expected: torch.Tensor, found: torch.Tensor, rounding: float, rounded_to: torch.dtype | None
) -> Comparison:
    """Compares the logits of two models, [batch, time, vocabulary]. `rounding` is how far the last
    bits of the embedding move them; see `verify` for `rounded_to`."""
    largest = expected.abs().max().item()
    return Comparison(
        largest_difference=(expected - found).abs().max().item(),
        tolerance=max(
            TOLERANCE,
            min(TIMES_ROUNDING * rounding, ROUNDING_SHARE * largest),
            SHARE_OF_LARGEST_LOGIT.get(rounded_to, 0.0) * largest,
        ),
        largest_logit=largest,
        tokens=expected.shape[0] * expected.shape[1],
    )


def _hf_logits(
    folder: Path, token_ids: torch.Tensor, rewards: bool = False
) -> tuple[torch.Tensor, float]:
    """Returns the logits of the Hugging Face model, those of `rewards` [batch, time, 1], and how
    far the last bits of its embedding move them."""
    from megatron_patch.hf import MetaLAForCausalLM, MetaLAForSequenceClassification

    kind = MetaLAForSequenceClassification if rewards else MetaLAForCausalLM
    model, loading = kind.from_pretrained(folder, output_loading_info=True)
    wrong = {key: sorted(names) for key, names in loading.items() if names}
    if wrong:
        raise ConvertError(f"{folder}: does not fit the Hugging Face model: {wrong}")
    with torch.no_grad():
        model = model.float().eval()
        head = model.score if rewards else model.lm_head
        logits = head(model.model(token_ids, use_cache=False)[0])
        embedding = model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        up_or_down = torch.randint(2, embedding.shape, generator=generator) * 2 - 1
        embedding.mul_(1 + up_or_down * torch.finfo(torch.float32).eps)
        moved = head(model.model(token_ids, use_cache=False)[0])
    return logits, (moved - logits).abs().max().item()


def _neox_logits(
    neox: Path, source: NeoXCheckpoint, token_ids: torch.Tensor, work: Path
) -> torch.Tensor:
    """Returns the logits, [batch, time, padded vocabulary], of the tensor-parallel GPT-NeoX
    model."""
    ranks = source.tensor_parallel
    torch.save(token_ids, work / "tokens.pt")
    job = {"settings": source.settings, "form": source.form, "ranks": ranks}
    job["step"] = str(source.step.resolve())
    (work / "job.json").write_text(json.dumps(job, default=str))
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(neox), str(ROOT), inherited])),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "WANDB_MODE": "disabled",
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    processes, logs = [], []
    try:
        for rank in range(ranks):
            logs.append((work / f"rank{rank}.log").open("w+"))
            streams = {"stdout": logs[-1], "stderr": subprocess.STDOUT}
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "convert.verify", str(work)]
            processes.append(subprocess.Popen(command, env=own, cwd=work, **streams))
        failed = _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    if failed is not None:
        logs[failed].seek(0)
        lines = logs[failed].read().strip().splitlines()
        print("\n".join(lines[-30:]), file=sys.stderr)
        reason = re.sub(r"\x1b\[\d*m|\[rank\d+\]: ", "", lines[-1]) if lines else "no output"
        raise ConvertError(
            f"the GPT-NeoX model of rank {failed} cannot be run: "
            f"exit code {processes[failed].returncode}, {reason}"
        )
    for log in logs:
        log.close()
    return torch.load(work / "logits.pt", weights_only=True)


def _wait(processes: list[subprocess.Popen]) -> int | None:
    """Waits for all processes and returns `None`, or returns the index of the first that fails,
    since the others would wait for it forever."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [i for i, code in enumerate(codes) if code]
        if failed:
            return failed[0]
        if None not in codes:
            return None
        time.sleep(0.05)


# ---- One rank of the GPT-NeoX model, in a process of its own


def rank_tensors(step: Path, form: str, rank: int) -> dict[int, dict]:
    """Returns the tensors of each layer on a rank, by layer index, from the rank's own files."""
    if form == "layer-file":
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
    """Returns all tensors of a ZeRO stage 3 checkpoint in their training dtypes, joined by
    DeepSpeed's own code. DeepSpeed does not open the files: it would run code that they hold."""
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


def build_model(settings: dict, ranks: int, padded_vocab_size: int, length: int) -> torch.nn.Module:
    """Builds the run's GPT-NeoX model on this one of `ranks` tensor-parallel ranks, in float32,
    with all pipeline stages, for sequences of `length` tokens and `padded_vocab_size` rows over all
    ranks."""
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
    # Operator and attention must run on the CPU, on whole sequences.
    here = {"backend": "auto", "context_parallel_size": 1}
    metala = {**(settings.get("metala") or {}), **here}
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
            "lazy_mpu_init": True,  # does not compile the data set helper
        }
    )
    neox_args.padded_vocab_size = padded_vocab_size
    neox_args.train_impl = settings.get("train_impl", "normal")  # a reward model has another head
    deepspeed.init_distributed(dist_backend="gloo")
    neox_args.configure_distributed_args()
    initialize_megatron(neox_args, allow_no_cuda=True)()
    neox_args.use_cpu_initialization = False  # `lazy_mpu_init` set it; it takes more memory
    return GPT2ModelPipe(neox_args, parallel_output=False, topology=mpu.get_topology())


def load(model: torch.nn.Module, layers: dict[int, dict]) -> None:
    """Loads the tensors of each layer strictly. Raises a RuntimeError if a tensor is missing,
    unexpected or of another shape."""
    for index, module in enumerate(model.forward_funcs):
        state = layers.pop(index, {})
        if isinstance(module, torch.nn.Module):
            module.load_state_dict(state, strict=True)
        elif state:
            raise RuntimeError(f"layer {index} has no tensors in GPT-NeoX, found {sorted(state)}")
    if layers:
        raise RuntimeError(f"GPT-NeoX's model has no layers {sorted(layers)}")


def main() -> None:
    """Writes the logits of the tokens in a work folder; `_neox_logits` starts this on each rank."""
    work = Path(sys.argv[1])
    job = json.loads((work / "job.json").read_text())
    rank, ranks = int(os.environ["RANK"]), job["ranks"]
    # Ranks that meet at a file need no port, which another run might take.
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
