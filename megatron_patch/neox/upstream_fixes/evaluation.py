"""The evaluation of tasks, in eval.py and, with `eval_tasks`, in train.py."""

from __future__ import annotations

from importlib.metadata import version

from megatron_patch.neox.notices import say
from megatron_patch.neox.patching import repairs


# eval_tasks/eval_adapter.py:403 and 484
@repairs("lm_eval", "eval_tasks.eval_adapter:EvalHarnessAdapter.run_eval", "limit=10,  # limit")
def evaluate_by_todays_lm_eval() -> None:
    """Puts an adapter for today's lm_eval in place of GPT-NeoX's, which evaluates the first ten
    questions of each task, and fails with every lm_eval since 0.4.2."""
    from eval_tasks import eval_adapter

    from megatron_patch.neox.upstream_fixes.lm_eval_adapter import NeoXModel

    eval_adapter.EvalHarnessAdapter = NeoXModel
    say(f"eval_tasks run whole, by lm_eval {version('lm_eval')}")
