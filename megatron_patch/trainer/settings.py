"""Reads GPT-NeoX's settings for a run with the Hugging Face Trainer.

Every setting is honoured, or listed as ignored because it has no meaning here, or refused with a
line that names it. None is dropped silently. Defaults are GPT-NeoX's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from megatron_patch.architecture import (
    EXPORTED_NORMS,
    MetaLAOptions,
    SettingsError,
    refuse,
    yaml_number_hint,
)
from megatron_patch.architecture_neox import GPT_NEOX_DEFAULTS, expand_attention_config
from megatron_patch.neox.data_settings import check_paths
from megatron_patch.neox.settings import check_settings
from megatron_patch.neox.yaml_config import merge_yaml

# These steer GPT-NeoX's processes, memory, kernels, logs and generation, not what is learned.
IGNORED_SETTINGS = frozenset(
    """
    account activation_checkpointing bias_dropout_fusion bias_gelu_fusion checkpoint_in_cpu
    checkpoint_num_layers checkpoint_validation_with_forward_pass comment comms_logger
    communication_data_type contiguous_checkpointing csv_monitor data_types deepspeed
    deepspeed_activation_checkpointing deepspeed_mpi deepspeed_slurm
    distributed_backend do_test do_train do_valid dump_state eval_results_prefix eval_tasks
    exclude flops_profiler force_multi fp32_allreduce fused_kernels_build_path git_hash
    gradient_predivide_factor hostfile hysteresis include launcher layernorm_fusion log_dir
    log_grad_norm log_grad_pct_zeros log_optimizer_states log_param_norm loss_scale_window
    master_addr master_port max_position_embeddings maximum_tokens
    memory_profiling memory_profiling_path merge_file min_scale mmap_warmup no_ssh_check
    num_gpus num_nodes num_samples num_workers output_layer_parallelism partition_activations
    peak_theoretical_tflops pipe_partition_method prescale_gradients profile profile_backward
    profile_step_start profile_step_stop prompt_end recompute return_logits rmsnorm_fusion
    rope_fusion sample_input_file sample_output_file scaled_masked_softmax_fusion
    scaled_upper_triang_masked_softmax_fusion steps_per_print synchronize_each_layer temperature
    tensorboard tensorboard_dir test_data_paths test_data_weights text_gen_type top_k top_p
    use_cpu_initialization use_flashattn_swiglu use_shared_fs
    wall_clock_breakdown wandb_init_all_ranks
    """.split()
)


def only(*values: Any, any_case: bool = False) -> Any:
    """Returns the type of a setting that may only have one of `values`; `any_case` ignores case."""

    def is_one(value: Any, known: Any) -> bool:
        # In Python, 1 == True.
        return value == known and (isinstance(value, bool) == isinstance(known, bool))

    def check(value: Any) -> Any:
        found = value.lower() if any_case and isinstance(value, str) else value
        if not any(is_one(found, known) for known in values):
            raise ValueError(
                f"wanted {' or '.join(map(str, values))} with the Hugging Face Trainer"
            )
        return found

    return Annotated[Any, AfterValidator(check)]


# Strict types, as in GPT-NeoX. Paths and tuples are converted, because YAML has neither.
class _Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )


def _named(path: Any) -> Any:
    """Refuses an empty path, which would be the current folder."""
    if path == "":
        raise ValueError("wanted the name of a folder or file")
    return path


_Path = Annotated[Path, Field(strict=False), BeforeValidator(_named)]
_Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]


class OptimizerParams(_Settings):
    """The settings under `optimizer.params`."""

    lr: PositiveFloat
    betas: Annotated[tuple[_Beta, _Beta], Field(strict=False)] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class Optimizer(_Settings):
    """The settings under `optimizer`. Every type is Adam with decoupled weight decay (AdamW), as
    GPT-NeoX's fused Adam is."""

    type: only("adam", "cpu_adam", "cpu_torch_adam", any_case=True) = "adam"
    params: OptimizerParams


class ZeroOptimization(_Settings):
    """The settings under `zero_optimization`. Stages 0 and 1 compute the same in float32; the other
    settings concern memory and are ignored."""

    model_config = ConfigDict(extra="ignore")

    stage: only(0, 1) = 0


class TrainerSettings(_Settings):
    """The checked settings of one run."""

    # model
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt | None = None
    expansion_factor: PositiveFloat | None = None
    attention_config: list
    metala: dict | None = None
    norm: only(*EXPORTED_NORMS) = GPT_NEOX_DEFAULTS["norm"]
    rms_norm_epsilon: PositiveFloat = GPT_NEOX_DEFAULTS["rms_norm_epsilon"]
    layernorm_epsilon: PositiveFloat = GPT_NEOX_DEFAULTS["layernorm_epsilon"]
    activation: only("swiglu") = GPT_NEOX_DEFAULTS["activation"]
    pos_emb: only("none") = GPT_NEOX_DEFAULTS["pos_emb"]
    no_weight_tying: bool = False
    init_method: only("normal") = "normal"
    output_layer_init_method: only("normal", "scaled_normal") = "scaled_normal"
    init_method_std: PositiveFloat = 0.02
    hidden_dropout: only(0) = 0.0
    attention_dropout: only(0) = 0.0
    num_kv_heads: PositiveInt | None = None
    mlp_multiple_of: only(1) = 1
    gpt_j_residual: only(False) = False
    use_mup: only(False) = False
    moe_num_experts: only(1) = 1
    te_columnparallel: only(False) = False
    te_rowparallel: only(False) = False
    te_layernorm_mlp: only(False) = False
    soft_prompt_tuning: only(None) = None

    # parallelism
    model_parallel_size: only(0, 1) = 1
    pipe_parallel_size: only(0, 1) = 0
    sequence_parallel: only(False) = False
    zero_optimization: ZeroOptimization | None = None

    # data
    tokenizer_type: only("HFTokenizer") = GPT_NEOX_DEFAULTS["tokenizer_type"]
    vocab_file: _Path
    make_vocab_size_divisible_by: PositiveInt = GPT_NEOX_DEFAULTS["make_vocab_size_divisible_by"]
    data_path: str | None = None
    train_data_paths: list[str] | None = None
    valid_data_paths: list[str] | None = None
    train_data_weights: list[NonNegativeFloat] | None = None
    valid_data_weights: list[NonNegativeFloat] | None = None
    weight_by_num_documents: only(False) = False
    split: str = "969, 30, 1"
    seq_length: PositiveInt
    data_impl: only("mmap", "infer") = "infer"
    pack_impl: only("packed") = "packed"
    dataset_impl: only("gpt2") = "gpt2"
    train_impl: only("normal") = "normal"
    allow_chopped: only(True) = True
    eod_mask_loss: only(False) = False
    z_loss: only(0) = 0.0
    curriculum_learning: only(None) = None

    # batch and length
    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = 1
    train_iters: PositiveInt

    # optimizer
    optimizer: Optimizer
    lr_decay_style: Literal["constant", "linear", "cosine", "exponential"] = "linear"
    lr_decay_iters: PositiveInt | None = None
    lr_decay_fraction: PositiveFloat | None = None
    min_lr: NonNegativeFloat = 0.0
    warmup: float = Field(0.01, ge=0, le=1)
    use_checkpoint_lr_scheduler: bool = False
    override_lr_scheduler: bool = False
    weight_decay: NonNegativeFloat = 0.1
    gradient_clipping: NonNegativeFloat = 1.0
    precision: only("fp32", "bfloat16") = "fp32"
    checkpoint_activations: bool = False
    seed: int = Field(1234, ge=0, lt=2**32)  # NumPy's range

    # bookkeeping
    save: _Path
    load: _Path | None = None
    finetune: only(False) = False
    iteration: only(None) = None
    checkpoint_factor: PositiveInt | None = None
    checkpoint_scale: only("linear") = "linear"
    keep_last_n_checkpoints: PositiveInt | None = None
    eval_interval: PositiveInt = 1000
    eval_iters: NonNegativeInt = 100
    log_interval: PositiveInt = 100
    use_wandb: bool | None = None
    wandb_project: str = "neox"
    wandb_group: str | None = None
    wandb_run_name: str | None = None
    wandb_team: str | None = None
    wandb_host: str = "https://api.wandb.ai"

    @property
    def metala_options(self) -> MetaLAOptions:
        return MetaLAOptions.parse(self.metala)

    @property
    def decay_iters(self) -> int:
        """The number of steps of the learning rate's schedule, warm-up included."""
        if self.lr_decay_iters is not None:
            return self.lr_decay_iters
        return max(1, math.floor(self.train_iters * (self.lr_decay_fraction or 1.0)))

    def batch(self, world_size: int) -> tuple[int, int]:
        """Returns (sequences per process and micro-batch, accumulation steps). Raises a
        SettingsError if the three batch settings contradict each other for a number of
        processes."""
        total, micro = self.train_batch_size, self.train_micro_batch_size_per_gpu
        steps = self.gradient_accumulation_steps
        if total is None and micro is None:
            raise SettingsError(
                "train_micro_batch_size_per_gpu: found nothing, wanted it or train_batch_size"
            )
        if steps is None:
            steps = 1 if total is None or micro is None else total // (micro * world_size)
        micro = micro or total // (steps * world_size)
        total = total or micro * steps * world_size
        if not total == micro * steps * world_size > 0:
            raise SettingsError(
                f"train_batch_size: found {total}, wanted train_micro_batch_size_per_gpu x "
                f"gradient_accumulation_steps x processes = {micro} x {steps} x {world_size}"
            )
        return micro, steps


def read_settings(paths: Iterable[str | Path]) -> tuple[TrainerSettings, list[str]]:
    """Returns the settings of YAML files, and the names of those that are ignored. Raises a
    SettingsError, one line that names every setting that cannot be honoured, what was found and
    what was wanted."""
    given = merge_yaml(paths)
    ignored = sorted(key for key in given if key in IGNORED_SETTINGS)
    try:
        settings = TrainerSettings(**{k: v for k, v in given.items() if k not in ignored})
    except ValidationError as error:
        raise SettingsError("; ".join(_describe(e) for e in error.errors())) from None
    _check(settings)
    return settings, ignored


def _describe(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return (
            f"{key}: not a setting for the Hugging Face Trainer; remove it or train with GPT-NeoX"
        )
    if error["type"] == "missing":
        return f"{key}: found nothing, wanted a value"
    found, reason = error["input"], error["msg"].removeprefix("Value error, ")
    line = f"{key}: found {found!r}, {reason[0].lower()}{reason[1:]}"
    if error["type"] in ("float_type", "int_type"):
        line += yaml_number_hint(found)
    return line


def _check(settings: TrainerSettings) -> None:
    """Checks the combinations of settings, and settings against the machine."""
    layers = expand_attention_config(settings.attention_config, settings.num_layers)
    others = sorted(set(layers) - {"metala"})
    if others:
        raise SettingsError(
            f"attention_config: found layers of type {', '.join(others)}, wanted metala alone with "
            "the Hugging Face Trainer"
        )
    check_paths(settings.model_dump(mode="json"))
    # A setting that is refused here has its default.
    neox = {**GPT_NEOX_DEFAULTS, **settings.model_dump(), "pipe_partition_method": "type:metala"}
    check_settings(SimpleNamespace(**neox))
    zero = settings.zero_optimization
    if settings.precision == "bfloat16" and (zero is None or zero.stage != 1):
        found = "nothing" if zero is None else zero.stage
        raise SettingsError(
            f"zero_optimization.stage: found {found}, wanted 1 with precision bfloat16: without "
            "ZeRO, GPT-NeoX's optimizer takes a step on gradients of zero before its first one"
        )
    runs_on = settings.train_iters > settings.decay_iters and settings.lr_decay_style != "constant"
    if settings.warmup == 1 and runs_on:
        raise SettingsError(
            f"warmup: found 1, wanted less, since training goes on after the {settings.decay_iters}"
            " iterations of the learning rate's schedule"
        )
    if settings.use_checkpoint_lr_scheduler and settings.override_lr_scheduler:
        refuse("override_lr_scheduler", True, "False beside use_checkpoint_lr_scheduler")
    if (backend := settings.metala_options.backend) != "auto":
        refuse("metala.backend", backend, "auto with the Hugging Face Trainer")
    if (ranks := settings.metala_options.context_parallel_size) > 1:
        refuse("metala.context_parallel_size", ranks, "1 with the Hugging Face Trainer")
    if bool(settings.data_path) == bool(settings.train_data_paths):
        raise SettingsError("data_path: wanted either it or train_data_paths")
    for name in ("train", "valid"):
        paths = getattr(settings, f"{name}_data_paths")
        weights = getattr(settings, f"{name}_data_weights")
        if weights is not None and len(weights) != len(paths or ()):
            raise SettingsError(f"{name}_data_weights: wanted one for each of {name}_data_paths")
    if not settings.vocab_file.is_file():
        raise SettingsError(f"vocab_file: found no file {settings.vocab_file}")
    settings.batch(int(os.environ.get("WORLD_SIZE", "1")))
