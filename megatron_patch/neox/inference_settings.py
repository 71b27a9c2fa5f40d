"""Checks of the settings by which GPT-NeoX generates and evaluates, before any rank exists."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_patch.architecture import METALA, SOFTMAX_TYPES, SettingsError, refuse
from megatron_patch.architecture_neox import expand_attention_config

_MODES = ("unconditional", "input-file", "interactive")
_OLDEST_LM_EVAL = (0, 4, 5)
_USUAL_TOKENS = 64  # GPT-NeoX's default of maximum_tokens


def check_inference(args: Any, program: str) -> None:
    """Checks a run of generate.py or eval.py, or one of train.py that evaluates tasks. Raises a
    SettingsError."""
    if program == "generate.py":
        _check_generation(args)
    if evaluates(args, program):
        _check_evaluation(args)
    if program == "generate.py" or evaluates(args, program):
        if args.return_logits:
            refuse("return_logits", True, "false: GPT-NeoX writes past the end of their table")
        _check_cache(args)


def evaluates(args: Any, program: str) -> bool:
    """Returns whether a run evaluates tasks by lm_eval."""
    return program == "eval.py" or (program == "train.py" and bool(args.eval_tasks))


def _check_generation(args: Any) -> None:
    # GPT-NeoX's own defaults
    mode = args.text_gen_type or ("input-file" if args.sample_input_file else "unconditional")
    if mode == "precompute":
        refuse(
            "text_gen_type",
            mode,
            f"{' or '.join(_MODES)}: precomputed logits serve preference training alone",
        )
    if mode not in _MODES:
        refuse("text_gen_type", mode, " or ".join(_MODES))
    if mode == "input-file" and not Path(args.sample_input_file or "").is_file():
        refuse("sample_input_file", args.sample_input_file, "a file with prompts")
    if mode != "interactive" and (output := args.sample_output_file):
        if not Path(output).absolute().parent.is_dir():
            refuse("sample_output_file", output, "a file in a folder that exists")
    tokens = args.maximum_tokens
    if tokens > args.seq_length and tokens != _USUAL_TOKENS:
        wanted = f"at most seq_length, which is {args.seq_length}: GPT-NeoX ends a text there"
        refuse("maximum_tokens", tokens, wanted)


def _check_evaluation(args: Any) -> None:
    tasks = args.eval_tasks
    if not tasks or not all(isinstance(task, str) and task for task in tasks):
        refuse("eval_tasks", tasks, "names of tasks of lm_eval, or YAML files of your own tasks")
    for task in tasks:
        if task.endswith(".yaml") and not Path(task).is_file():
            refuse("eval_tasks", task, "a file that exists")
    try:
        found = version("lm_eval")
    except PackageNotFoundError:
        found = None
    if found is None or _numbers(found) < _OLDEST_LM_EVAL:
        raise SettingsError(
            f"eval_tasks: found {f'lm_eval {found}' if found else 'no lm_eval'}, wanted it "
            "installed: python -m pip install 'lm_eval[hf]>=0.4.5,<0.5'"
        )


def _numbers(found: str) -> tuple[int, ...]:
    return tuple(int(part) for part in found.split(".")[:3] if part.isdigit())


def _check_cache(args: Any) -> None:
    """Refuses the cache where a layer of a hybrid cannot go on from it. GPT-NeoX counts positions
    from the first token that it is given."""
    if args.recompute:
        return
    kinds = set(expand_attention_config(args.attention_config, args.num_layers)) - {METALA}
    if others := sorted(kinds - set(SOFTMAX_TYPES)):
        wanted = f"true: GPT-NeoX caches nothing in layers of type {', '.join(others)}"
        refuse("recompute", args.recompute, wanted)
    wanted = f"true with pos_emb: {args.pos_emb}"
    loses = "GPT-NeoX's cache loses the positions"
    if kinds and args.pos_emb in ("sinusoidal", "rpe"):
        refuse("recompute", args.recompute, f"{wanted}: {loses}")
    if kinds and args.pos_emb == "learned" and args.pipe_parallel_size > 0:
        refuse("recompute", args.recompute, f"{wanted} and pipe_parallel_size above 0: {loses}")
