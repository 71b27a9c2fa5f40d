"""Repairs of faults in GPT-NeoX (at ea7aefd8) and DeepSpeed (0.19.8), each with its place upstream.

Nothing here is part of MetaLA. A repair is applied only while the faulty line still stands in the
source, so that a release that mends it is left alone, and it acts in runs with MetaLA layers only,
except where a repaired function knows no run (marked "every run" below).

Checks of settings that GPT-NeoX accepts and cannot honour are in `run_settings.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from typing import NamedTuple

from megatron_patch.neox.upstream_fixes import (
    cpu_mode,
    data,
    generation,
    gradient_norm,
    processes,
    saving,
    small,
    watchdog,
)


class Fix(NamedTuple):
    """A repair.

    Attributes:
        name: what is repaired, for the log line.
        place: the function upstream, as "module:name", or a whole module.
        faulty: text in the function's source that a release without the fault would not have; ""
            for a safety net that upstream does not have at all.
        apply: function that repairs it in this process.
    """

    name: str
    place: str
    faulty: str
    apply: Callable[[], None]

    def is_needed(self) -> bool:
        """Returns whether the fault is still there, also where the source cannot be read."""
        module, _, path = self.place.partition(":")
        try:
            owner = reduce(getattr, filter(None, path.split(".")), import_module(module))
            return self.faulty in inspect.getsource(owner)
        except (ImportError, AttributeError):
            return False
        except OSError:
            return True


# Later repairs wrap earlier ones of the same function, so the order counts.
FIXES = (
    # megatron/initialize.py:44 asserts CUDA. https://github.com/EleutherAI/gpt-neox/issues/580
    Fix(
        "start without CUDA",
        "megatron.initialize:initialize_megatron",
        "Megatron requires CUDA",
        cpu_mode.initialize_without_cuda,
    ),
    # No run knows of another one that saves to the same folder, or that it cannot write there.
    Fix(
        "locked save folder",
        "megatron.initialize:initialize_megatron",
        "",
        saving.check_save_at_start,
    ),
    # megatron/data/indexed_dataset.py:71: `elif` after `infer` opens no data set. Every run.
    Fix(
        "data_impl: infer",
        "megatron.data.indexed_dataset:make_dataset",
        'elif impl == "cached"',
        small.open_inferred_data_sets,
    ),
    # megatron/data/gpt2_dataset.py:229 and pairwise_dataset.py name index maps after sizes, not
    # after the data that they index.
    Fix(
        "index maps",
        "megatron.data.gpt2_dataset:_build_index_mappings",
        '_filename += "_{}pi".format(packing_impl)',
        data.name_index_maps_after_data,
    ),
    # megatron/neox_arguments/arguments.py:908 counts the machine's GPUs, not those that run.
    Fix(
        "number of ranks",
        "megatron.neox_arguments.arguments:NeoXArgs.calculate_derived",
        "global_num_gpus = torch.cuda.device_count()",
        processes.check_ranks_before_training,
    ),
    # Nothing compares the parameters that tensor-parallel ranks hold in common.
    Fix(
        "equal replicas",
        "megatron.checkpointing:save_checkpoint",
        "",
        saving.check_before_saving,
    ),
    # megatron/checkpointing.py:158 deletes whatever lies in a folder named like a step.
    Fix(
        "keep_last_n_checkpoints",
        "megatron.checkpointing:delete_old_checkpoints",
        "re.search(ckpt_dir_regex, i)",
        saving.delete_old_checkpoints_alone,
    ),
    # deepspeed/runtime/checkpoint_engine/torch_checkpoint_engine.py: `torch.load` compares no CRC.
    Fix(
        "damaged checkpoints",
        "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine.load",
        "torch.load(",
        saving.refuse_damaged_files,
    ),
    # megatron/training.py:544 returns a loss where `evaluate` (line 1611) unpacks two values. Every
    # run. https://github.com/EleutherAI/gpt-neox/issues/1320 is a neighbour.
    Fix(
        "validation in a pipeline",
        "megatron.training:forward_step",
        "return model.eval_batch(data_iterator",
        small.return_metrics_in_pipelines,
    ),
    # megatron/text_generation_utils.py:751: `stream_tokens` keeps an earlier prompt's caches.
    Fix(
        "caches of earlier prompts",
        "megatron.text_generation_utils:stream_tokens",
        "",
        generation.forget_earlier_prompts,
    ),
    # megatron/model/gpt2_model.py:345 and utils.py:126 gather no logits of tied heads and of models
    # without a pipeline. Every run.
    Fix(
        "logits of tensor-parallel ranks",
        "megatron.model.gpt2_model:GPT2ModelPipe._set_parallel_output",
        "isinstance(final_layer, (ParallelLinearPipe, ParallelLinear))",
        generation.gather_logits,
    ),
    # megatron/utils.py:144 switches wandb off without a key, which WANDB_MODE=offline does not
    # need; megatron/neox_arguments/arguments.py:453 calls a function that wandb moved. Every run.
    Fix(
        "wandb offline",
        "megatron.utils:get_wandb_api_key",
        'if "WANDB_LOCAL" in os.environ',
        small.log_to_wandb_offline,
    ),
    # megatron/tokenizer/tokenizer.py:160 builds GPT2Tokenizer from file names, which transformers 5
    # does not take. Every run.
    Fix(
        "GPT2BPETokenizer",
        "megatron.tokenizer.tokenizer:_GPT2BPETokenizer.__init__",
        "GPT2Tokenizer(",
        small.repair_gpt2_tokenizer,
    ),
    # deepspeed/runtime/utils.py:394 asks for the wrong rank.
    Fix(
        "gradient norm without ZeRO",
        "deepspeed.runtime.utils:clip_grad_norm_",
        "get_model_parallel_rank",
        gradient_norm.clip_each_parameter_once,
    ),
    # deepspeed/runtime/zero/stage_1_and_2.py:2943 and bf16_optimizer.py:547: stages with different
    # parameter groups wait for each other for ever, or have nothing to add up.
    Fix(
        "gradient norm of unequal stages",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.scaled_global_norm",
        "enumerate(self.bit16_groups)",
        gradient_norm.reduce_equally_often,
    ),
    # megatron/training.py:883 to 970 and text_generation_utils.py print a line and call `exit()`.
    Fix("exit codes", "megatron.training", " exit()", processes.fail_where_it_failed),
    # No rank notices that another one has stopped.
    Fix("watchdog", "megatron.training:pretrain", "", watchdog.watch_ranks),
)
# Repairs of the launcher, which it applies when it has read the settings of a run with MetaLA.
LAUNCHER_FIXES = (
    # deepspeed/launcher/runner.py:639 takes a killed launcher (a negative code) for success.
    # Compare https://github.com/deepspeedai/DeepSpeed/issues/618, mended for failing scripts alone.
    Fix(
        "killed launchers",
        "deepspeed.launcher.runner:main",
        "if result.returncode > 0",
        processes.fail_where_launched_was_killed,
    ),
)


_applied: dict[str, bool] = {}  # by name: whether the repair was needed


def apply(fixes: tuple[Fix, ...] = FIXES) -> None:
    """Applies the repairs whose fault is still there."""
    for fix in fixes:
        _applied[fix.name] = fix.is_needed()
        if _applied[fix.name]:
            fix.apply()


def summary() -> str:
    """Returns the line that names the repairs of this process, and those that upstream mended."""
    applied = ", ".join(name for name, is_needed in _applied.items() if is_needed)
    mended = ", ".join(name for name, is_needed in _applied.items() if not is_needed)
    return f"repairs of GPT-NeoX and DeepSpeed: {applied}" + (f"; mended: {mended}" * bool(mended))
