"""Runs the Hugging Face Trainer with GPT-NeoX's samples, loss, learning rates and weight decay."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from megatron_patch.architecture import SettingsError
from megatron_patch.commands.command_line import first_line, told
from megatron_patch.save_folder import held
from megatron_patch.torch_file import readable
from megatron_patch.trainer.model import load_tokenizer
from megatron_patch.trainer.schedule import ResumableLR, Schedule
from megatron_patch.trainer.settings import TrainerSettings

METRICS = "metrics.jsonl"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the optimizer's groups with and without weight decay, split as in GPT-NeoX. Biases,
    norm weights and `aug_balance`, the learned vector w of the self-augmentation, have none."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        skip = name.endswith(("bias", "aug_balance")) or "norm" in name
        (free if skip else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def collate(samples: list[dict[str, torch.Tensor]], vocab_size: int) -> dict[str, torch.Tensor]:
    """Returns samples as a batch. Raises a SettingsError if one has a token that is none of the
    vocabulary, which PyTorch would report without saying whose it is."""
    batch = default_data_collator(samples)
    if (largest := max(int(tokens.max()) for tokens in batch.values())) >= vocab_size:
        raise SettingsError(
            f"vocab_file: found the token {largest} in the data, wanted one below {vocab_size}, "
            "the number of the tokenizer's tokens: another tokenizer prepared these data"
        )
    return batch


@contextmanager
def reading(checkpoint: str | Path | None) -> Iterator[None]:
    """Turns what a damaged file of a checkpoint raises into a SettingsError that names the
    checkpoint."""
    try:
        yield
    except SettingsError:
        raise
    except Exception as error:  # torch, safetensors and transformers raise many types
        if isinstance(error, OSError) and error.filename is not None:  # missing, or no permission
            raise
        raise SettingsError(
            f"load: found {checkpoint} damaged ({told(error)[:200]}), wanted a checkpoint that can "
            "be read; without this folder, the run goes on from the one before"
        ) from None


class MetaLATrainer(Trainer):
    """The Trainer for samples in a fixed order, whose `labels` are already shifted. `validation`
    returns the samples of evaluation 0, 1, ...; `None` for no validation."""

    def __init__(
        self, settings: TrainerSettings, validation: Callable[[int], Dataset] | None, **kwargs: Any
    ):
        self.settings = settings
        self.validation = validation
        super().__init__(**kwargs)
        # With this flag `compute_loss` divides by the accumulation steps. Without it, transformers
        # 4.46 does not divide at all, and later releases do.
        self.model_accepts_loss_kwargs = True
        # Not as `processing_class`, by which transformers 5 changes the model's special tokens.
        self.own_tokenizer = load_tokenizer(settings)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        self.own_tokenizer.write(Path(output_dir or self.args.output_dir))

    @property
    def _train_batch_size(self) -> int:
        """The batch size of this run; transformers 4 would assign that of a resumed checkpoint."""
        return self.args.train_batch_size

    @_train_batch_size.setter
    def _train_batch_size(self, size: int) -> None:
        pass

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _load_from_checkpoint(self, checkpoint: str, *args: Any) -> None:
        with reading(checkpoint):
            super()._load_from_checkpoint(checkpoint, *args)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Returns the batch's mean cross entropy, in training divided by the accumulation steps.

        All batches have the same number of labels. `num_items_in_batch` is not used, because the
        Trainer leaves out the first label of each sequence, as if labels were still to be shifted.
        """
        tokens, config, seq_idx = inputs["input_ids"], self.model.config, None
        if config.reset_at_document:
            ends = (tokens == config.eos_token_id).long()
            seq_idx = ends.cumsum(1) - ends  # an end-of-document token ends its own document
        outputs = model(input_ids=tokens, seq_idx=seq_idx, use_cache=False)
        logits = outputs.logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, inputs["labels"].flatten())
        if model.training:
            loss = loss / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset: Dataset | None = None, **kwargs: Any) -> dict[str, float]:
        """Evaluates on `eval_dataset`, by default on the samples that are due at this step."""
        if eval_dataset is None:
            number = self.state.global_step // self.settings.eval_interval - 1
            eval_dataset = self.validation(number)
        return super().evaluate(eval_dataset, **kwargs)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Logs the learning rate of the step just done; transformers 4 passes that of the next."""
        if "learning_rate" in logs:
            scheduler = self.lr_scheduler
            factor = scheduler.lr_lambdas[0](scheduler.last_epoch - 1)
            logs["learning_rate"] = scheduler.base_lrs[0] * factor
        super().log(logs, *args)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            params = self.settings.optimizer.params
            groups = parameter_groups(self.model, self.settings.weight_decay)
            self.optimizer = torch.optim.AdamW(
                groups, lr=params.lr, betas=params.betas, eps=params.eps
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = ResumableLR(
                optimizer or self.optimizer,
                Schedule.from_settings(self.settings),
                override=self.settings.override_lr_scheduler,
            )
        return self.lr_scheduler


class MetricsFile(TrainerCallback):
    """Appends the Trainer's logs to a file of JSON lines: `iteration`, and either `loss` (the mean
    since the last line), `learning_rate` and `grad_norm`, or `eval_loss`."""

    KEYS = ("loss", "learning_rate", "grad_norm", "eval_loss")

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        """Removes the lines of steps after the checkpoint, which an interrupted run has logged."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = read_metrics(self.path) if self.path.exists() else []
            rows = [row for row in rows if row["iteration"] <= state.global_step]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        # The Trainer would keep the intervals of the checkpoint.
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        row = {key: logs[key] for key in self.KEYS if key in (logs or {})}
        if row and state.is_world_process_zero:
            with open(self.path, "a") as file:
                file.write(json.dumps({"iteration": state.global_step, **row}) + "\n")


class EvaluationSteps(TrainerCallback):
    """Makes the Trainer evaluate after each `interval` steps only; newer releases of transformers
    would also evaluate at the last step."""

    def __init__(self, interval: int):
        self.interval = interval

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step % self.interval == 0


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the rows of a metrics file, up to a line that a killed run left half-written. Raises
    a SettingsError if another line is none of `MetricsFile`, which would write over it."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("iteration"), int):
            rows.append(row)
        elif row is None and line and '{"iteration": '.startswith(line[:14]):
            break
        else:
            raise SettingsError(
                f"save: found {line[:60]!r} in {path}, which is no line of a training's metrics, "
                "wanted a folder without a file of this name from elsewhere"
            )
    return rows


def find_checkpoint(settings: TrainerSettings) -> Path | None:
    """Returns the newest complete checkpoint in `load`, or `None` to start a new run. Raises a
    SettingsError if `load` is not `save` and has no checkpoint, or has only GPT-NeoX's; or if the
    run would write over checkpoints in `save`."""
    load, save = settings.load, settings.save
    found = None if load is None else _newest_checkpoint(load)
    if load is not None and load.resolve() == save.resolve() and found:
        return found
    if load is not None and not found:
        if (load / "latest").is_file() or any(load.glob("global_step*")):
            raise SettingsError(
                f"load: found a GPT-NeoX checkpoint in {load}, wanted one of the Hugging Face "
                "Trainer; convert/neox_to_hf.py makes a Hugging Face model of it"
            )
        if load.resolve() != save.resolve():
            raise SettingsError(f"load: found no checkpoint in {load}, wanted one to go on from")
    if other := _newest_checkpoint(save):
        raise SettingsError(
            f"save: found {other}, which this run would write over, wanted a folder of its own, or "
            f"load: {save} to go on from there"
        )
    return found


def _newest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint in a folder, `None` if there is none."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and _is_complete(path)
    }
    return found[max(found)] if found else None


def _is_complete(checkpoint: Path) -> bool:
    """Returns whether the file that the Trainer writes last is there, and whole."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (FileNotFoundError, ValueError):
        return False
    return True


def checkpoint_step(checkpoint: Path) -> int:
    """Returns the number of steps after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def wandb_wanted(settings: TrainerSettings) -> bool:
    """Returns whether to log to wandb. As in GPT-NeoX, a run logs only with an API key, or offline.
    Raises a SettingsError if `use_wandb` is on, but wandb cannot be imported."""
    mode = os.environ.get("WANDB_MODE", "online")
    if not settings.use_wandb or mode == "disabled":
        return False
    try:
        from wandb import init  # noqa: F401
    except Exception as error:  # missing, broken, or another module of this name
        raise SettingsError(
            f"use_wandb: found no wandb that works ({first_line(error)}), wanted pip install wandb"
        ) from None
    import requests

    names = {"WANDB_API_KEY", "WANDB_LOCAL"}
    known = names & set(os.environ) or requests.utils.get_netrc_auth(settings.wandb_host)
    if mode != "offline" and not known:
        print("use_wandb: no API key found (wandb login), going on without", file=sys.stderr)
        return False
    return True


@contextmanager
def wandb_run(settings: TrainerSettings) -> Iterator[bool]:
    """Yields whether to log to wandb. The Trainer opens a run of the settings' project, group and
    team there; it is closed at the end, so that a later training has a run of its own."""
    if not wandb_wanted(settings):
        yield False
        return
    import wandb

    is_open = wandb.run is not None  # the caller's own run, which the Trainer then logs to
    names = {"PROJECT": "project", "BASE_URL": "host", "RUN_GROUP": "group", "ENTITY": "team"}
    given = {f"WANDB_{name}": getattr(settings, f"wandb_{key}") for name, key in names.items()}
    given = {name: value for name, value in given.items() if value and name not in os.environ}
    with environment(given):
        try:
            yield True
        finally:
            if wandb.run is not None and not is_open:
                wandb.finish()


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables in this context."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def training_arguments(settings: TrainerSettings, use_wandb: bool) -> TrainingArguments:
    """Returns the Trainer's arguments for the settings."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    micro, steps = settings.batch(world_size)
    arguments = TrainingArguments(
        output_dir=str(settings.save),
        use_cpu=not torch.cuda.is_available(),
        max_steps=settings.train_iters,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=steps,
        average_tokens_across_devices=False,  # all batches have the same number of tokens
        learning_rate=settings.optimizer.params.lr,
        max_grad_norm=settings.gradient_clipping,
        bf16=settings.precision == "bfloat16",
        seed=settings.seed,
        logging_steps=settings.log_interval,
        logging_nan_inf_filter=False,  # the filter would replace a NaN by the mean of other losses
        eval_strategy="no",  # `EvaluationSteps` decides
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=settings.checkpoint_factor or settings.train_iters,
        save_total_limit=settings.keep_last_n_checkpoints,
        remove_unused_columns=False,
        dataloader_num_workers=0,  # reading a sample is only a copy from mapped memory
        report_to=["wandb"] if use_wandb else [],
        dataloader_pin_memory=torch.cuda.is_available(),
        run_name=settings.wandb_run_name,
    )
    # Without a launcher the Trainer would use DataParallel on all GPUs, with a batch for each.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def train(
    settings: TrainerSettings,
    model: nn.Module,
    train_samples: Dataset,
    validation: Callable[[int], Dataset] | None,
    checkpoint: Path | None,
) -> nn.Module:
    """Trains `model` to `train_iters`, from `checkpoint` if there is one. Writes checkpoints and
    METRICS to `save`. Evaluates every `eval_interval` steps and, as GPT-NeoX does, once more at the
    end, on the samples that `validation` returns for evaluation 0, 1, ...

    Returns the trained model, without the Trainer's wrappers for autocast and data parallelism.
    Raises a SettingsError if `save` cannot be written to, or another run holds it.
    """
    if settings.checkpoint_activations:
        model.gradient_checkpointing_enable()
    collator = partial(collate, vocab_size=model.config.vocab_size)
    callbacks = [MetricsFile(settings.save / METRICS)]
    if validation is not None:
        callbacks.append(EvaluationSteps(settings.eval_interval))
    is_first = os.environ.get("RANK", "0") == "0"
    # `accelerate launch` sets this variable too, and then it would override `bf16=False`.
    precision = {"ACCELERATE_MIXED_PRECISION": "bf16" if settings.precision == "bfloat16" else "no"}
    # transformers 4.46 cannot read the random states that it saved without `readable`.
    with wandb_run(settings) as use_wandb, readable():
        with environment(precision):
            trainer = MetaLATrainer(
                settings=settings,
                validation=validation,
                model=model,
                args=training_arguments(settings, use_wandb),
                train_dataset=train_samples,
                data_collator=collator,
                callbacks=callbacks,
            )
        with held(str(settings.save)) if is_first else nullcontext():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if validation is not None:
                trainer.evaluate(validation(settings.train_iters // settings.eval_interval))
    return trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
