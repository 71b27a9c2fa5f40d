"""Repairs of faults in GPT-NeoX (at ea7aefd8) and DeepSpeed (0.19.8). None is part of MetaLA.

Each repair stands beside the place upstream that it mends and the faulty text there. It is applied
only while that text is in the source, so a release that mends the fault is left alone. It acts in
runs with MetaLA layers only, except where the repaired function knows no run (`small.py`, and the
logits in `generation.py`), and for the start without CUDA.

The modules also hold the checks that the plugin calls itself: `resume.py` before a checkpoint is
loaded, `saving.py` for the folder, `processes.py` for launchers and ranks, `devices.py` and
`rendezvous.py` for where the ranks run and meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megatron_patch.neox.upstream_fixes import (
    batches,
    cpu_mode,
    data,
    evaluation,
    generation,
    gradient_norm,
    preferences,
    processes,
    resume,
    saving,
    sixteen_bits,
    small,
    training_loop,
    watchdog,
)

# Later repairs wrap earlier ones of the same function, so the order counts.
FIXES = (
    cpu_mode.initialize_without_cuda,
    saving.check_save_at_start,
    small.open_inferred_data_sets,
    data.name_index_maps_after_data,
    data.name_files_that_cannot_be_read,
    data.end_samples_with_their_documents,
    batches.blend_whole_data_sets,
    batches.read_batches_again,
    training_loop.stay_at_the_lowest_rate,
    training_loop.begin_with_the_rate_of_the_schedule,
    training_loop.average_over_iterations_done,
    processes.check_ranks_before_training,
    saving.check_before_saving,
    saving.delete_old_checkpoints_alone,
    saving.refuse_damaged_files,
    resume.load_for_other_lengths,
    training_loop.save_once,
    small.return_metrics_in_pipelines,
    generation.forget_earlier_prompts,
    generation.stop_in_completions,
    generation.write_samples_once,
    generation.talk_on_all_ranks,
    generation.gather_logits,
    small.log_to_wandb_offline,
    small.repair_gpt2_tokenizer,
    small.name_the_tokenizers_file,
    small.append_to_logs,
    preferences.define_log_probabilities,
    preferences.give_each_token_the_reward,
    preferences.check_labels_of_rewards,
    preferences.load_the_reference,
    gradient_norm.clip_each_parameter_once,
    gradient_norm.reduce_equally_often,
    sixteen_bits.step_pytorchs_adamw_as_one,
    sixteen_bits.take_no_step_at_the_start,
    sixteen_bits.tell_gradients_apart,
    processes.fail_where_it_failed,
    watchdog.watch_ranks,
)
# Repairs of the launcher, applied when it has read the settings of a run with MetaLA layers.
LAUNCHER_FIXES = (processes.fail_where_launched_was_killed,)
# Repairs of ranks that evaluate tasks. Their place imports lm_eval, which takes seconds.
EVALUATION_FIXES = (evaluation.evaluate_by_todays_lm_eval,)

_is_applied: dict[str, bool] = {}  # by the repair's name


def apply(fixes: Iterable[Callable[[], None]] = FIXES) -> None:
    """Applies the repairs whose fault is still there."""
    for fix in fixes:
        _is_applied[fix.repair] = fix.is_needed()
        if _is_applied[fix.repair]:
            fix()


def summary() -> str:
    """Returns the line that names the repairs of this process, and those that upstream mended."""
    applied = ", ".join(name for name, is_applied in _is_applied.items() if is_applied)
    mended = ", ".join(name for name, is_applied in _is_applied.items() if not is_applied)
    line = f"repairs of GPT-NeoX and DeepSpeed: {applied}"
    return f"{line}; mended: {mended}" if mended else line
