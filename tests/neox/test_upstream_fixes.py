"""Repairs are applied while the fault that they mend is in the source, and are listed in a line."""

from __future__ import annotations

from megatron_patch.neox import upstream_fixes
from megatron_patch.neox.patching import repairs


def test_every_fault_is_in_the_tested_release(in_neox, config):
    code = """
    from megatron_patch.neox import upstream_fixes
    every = upstream_fixes.FIXES + upstream_fixes.LAUNCHER_FIXES
    answer([[fix.repair for fix in every if not fix.is_needed()], upstream_fixes.summary()])
    """
    mended, line = in_neox(config, code)
    assert mended == [] and "mended" not in line
    assert line.startswith("repairs of GPT-NeoX and DeepSpeed: start without CUDA, ")


def test_what_upstream_has_mended_is_left_alone(monkeypatch):
    monkeypatch.setattr(upstream_fixes, "_is_applied", {})
    calls = []
    fixes = [
        repairs(name, place, faulty)(lambda name=name: calls.append(name))
        for name, place, faulty in (
            ("present", "textwrap:dedent", "def dedent("),
            ("mended", "textwrap:dedent", "a faulty line"),
            ("removed", "textwrap:no_such_function", ""),
            ("safety net", "textwrap", ""),
        )
    ]
    upstream_fixes.apply(fixes)
    assert calls == ["present", "safety net"]
    assert upstream_fixes.summary() == (
        "repairs of GPT-NeoX and DeepSpeed: present, safety net; mended: mended, removed"
    )


def test_a_registration_that_failed_is_none(in_neox, config):
    """A second import of GPT-NeoX must fail as the first one did."""
    code = """
    from megatron.neox_arguments.neox_args import ATTENTION_TYPE_CHOICES
    from megatron_patch.neox import registration

    def fail():
        raise AttributeError("no such method")

    ATTENTION_TYPE_CHOICES.remove("metala")
    registration._add_norm = fail
    failures = 0
    for _ in range(2):
        try:
            registration.register()
        except AttributeError:
            failures += 1
    answer(failures)
    """
    assert in_neox(config, code) == 2
