"""Trains a MetaLA model from GPT-NeoX's YAML files and data without GPT-NeoX, by the Hugging Face
Trainer, and writes a Hugging Face folder. The same command goes on where a run was stopped, if
`load` and `save` name the same folder. Start it with torchrun for several GPUs."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from convert.export_record import check_model_export, write_record
from convert.output_folder import check_target, complete_folder
from megatron_patch.architecture import SettingsError
from megatron_patch.commands.command_line import CommandError, Parser, output_folder, run_script
from megatron_patch.hf import MetaLAForCausalLM
from megatron_patch.hf.remote_code import write_model_code
from megatron_patch.neox.run_settings import warn_of_short_warmup
from megatron_patch.trainer.model import build_model, check_model, load_tokenizer, model_config
from megatron_patch.trainer.samples import build_samples
from megatron_patch.trainer.schedule import check_schedule
from megatron_patch.trainer.settings import TrainerSettings, read_settings
from megatron_patch.trainer.training import checkpoint_step, find_checkpoint, reading, train

TOLERANCE = 1e-4  # largest difference between float32 logits of the model and of its folder
VERIFIED_TOKENS = 64


def run(settings: TrainerSettings) -> MetaLAForCausalLM:
    """Trains to `train_iters`, from the newest checkpoint if there is one, and returns the model on
    its device."""
    tokenizer = load_tokenizer(settings)
    config = model_config(settings, tokenizer)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    train_samples, valid_samples = build_samples(settings, world_size)
    checkpoint = find_checkpoint(settings)
    if checkpoint is not None:
        with reading(checkpoint):
            check_model(config, checkpoint)
            check_schedule(settings, checkpoint)
        done = checkpoint_step(checkpoint)
        if done > settings.train_iters:
            raise SettingsError(
                f"train_iters: found {settings.train_iters}, wanted at least {done}, the "
                f"iterations that {checkpoint} has behind it"
            )
        if done == settings.train_iters:
            print(f"{checkpoint}: training is already complete")
            return MetaLAForCausalLM.from_pretrained(checkpoint)
    multiple = settings.make_vocab_size_divisible_by
    if padding := -tokenizer.size % multiple:
        print(
            f"make_vocab_size_divisible_by: {tokenizer.size:,} tokens stay so many; GPT-NeoX would "
            f"add {padding} rows, which count in its loss"
        )
    warn_of_short_warmup(settings.warmup, settings.decay_iters)
    model = build_model(settings, config)
    count = sum(p.numel() for p in model.parameters())
    origin = f"going on from {checkpoint}" if checkpoint else "from the start"
    print(f"{count:,} parameters, {settings.train_iters} iterations, {origin}", flush=True)
    return train(settings, model, train_samples, valid_samples, checkpoint)


def save(model: MetaLAForCausalLM, settings: TrainerSettings, folder: Path) -> None:
    """Writes the model with its code, configuration, tokenizer and checksums."""
    model.config.use_cache = True  # the Trainer switches it off
    model.save_pretrained(folder)
    write_model_code(folder)
    load_tokenizer(settings).write(folder)
    write_record(folder)


@torch.no_grad()
def largest_difference(model: MetaLAForCausalLM, folder: Path, tokens: torch.Tensor) -> float:
    """Returns the largest difference between the logits of `model` and those of the model reloaded
    from `folder`, on the CPU in float32. The reloaded model runs twice: once over all tokens, and
    once token by token through the recurrent state."""
    model = model.float().cpu().eval()
    reloaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).float().eval()
    wanted = model(tokens, use_cache=False).logits
    parallel = reloaded(tokens, use_cache=False).logits
    cache, steps = None, []
    for token in tokens.split(1, dim=1):
        output = reloaded(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    recurrent = torch.cat(steps, dim=1)
    return max((logits - wanted).abs().max().item() for logits in (parallel, recurrent))


def verify(model: MetaLAForCausalLM, settings: TrainerSettings, folder: Path) -> None:
    """Prints the largest difference between the logits of `model` and of `folder` on the first
    tokens of the data. Raises a CommandError if it is above TOLERANCE."""
    samples, _ = build_samples(settings, 1)
    tokens = samples[0]["input_ids"][None, :VERIFIED_TOKENS]
    difference = largest_difference(model, folder, tokens)
    print(f"Largest logit difference after reloading: {difference:.3e}")
    if not difference <= TOLERANCE:
        raise CommandError(f"wanted at most {TOLERANCE:.0e}; no folder is left")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("configs", nargs="+", help="YAML files, merged as GPT-NeoX merges them")
    add("-d", "--conf_dir", type=Path, help="folder of the YAML files")
    add("--output", type=output_folder, help="Hugging Face folder to write (SAVE/hf)")
    add(
        "--verify",
        action="store_true",
        help="compare the folder's logits; fail if they differ",
    )
    args = parser.parse_args(argv)
    paths = [args.conf_dir / name if args.conf_dir else Path(name) for name in args.configs]
    settings, ignored = read_settings(paths)
    if ignored:
        print(f"Settings without a meaning in the Hugging Face Trainer: {', '.join(ignored)}")
    output = args.output or settings.save / "hf"
    # A folder that this command wrote is replaced, since a run that goes on writes it again.
    check_target(output, True, check_model_export)
    model = run(settings)
    if int(os.environ.get("RANK", "0")):
        return
    with complete_folder(output, True, check_model_export) as folder:
        save(model, settings, folder)
        if args.verify:
            verify(model, settings, folder)
    print(f"Hugging Face model: {output}")


cli = partial(run_script, main)
