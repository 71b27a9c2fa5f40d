"""Adds up gradients for DeepSpeed's bfloat16 optimizer, with two passes over memory saved.

DeepSpeed keeps all gradients until the end of the backward pass, adds them one by one to float32
sums in flat tensors, and after each step fills the sums with zeros, twice. Here a gradient is added
as soon as it exists, in one kernel, and the first of a step takes the place of what the step before
left. Only sums to which a step added nothing are filled with zeros, before anything reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_patch.neox.patching import overrides
from megatron_patch.ops.backends import implementation


def add_to_sum(total: Tensor, gradient: Tensor, is_first: Tensor | None = None) -> None:
    """Adds a gradient to its sum, of any shape with as many elements, in one kernel. If the int32
    [] `is_first` is not 0, the sum counts as zero."""
    gradient = gradient.view_as(total)
    is_plain = total.is_contiguous() and gradient.is_contiguous()
    backend = "auto" if is_plain else "torch"
    add = implementation("accumulate", backend, gradient.dtype, gradient.device)
    add(total, gradient, is_first)


class GradientSums:
    """The sums of a DeepSpeed `BF16_Optimizer`.

    A sum of which DeepSpeed's `fp32_groups_has_gradients` says that it has no gradient yet may hold
    any number: the next gradient is added to zeros.

    Captured kernels cannot ask that. They read a flag on the GPU, which `before_replay` sets.

    Args:
        optimizer: its `bf16_groups`, `fp32_groups_gradients` and `fp32_groups_has_gradients` are
            read, lists of lists: parameters, their sums, and whether these have a gradient.
        when_added: is called with a parameter whose gradient has been added; or `None`.
    """

    def __init__(self, optimizer: Any, when_added: Callable[[nn.Parameter], None] | None = None):
        self.optimizer, self.when_added = optimizer, when_added
        self.places = {
            parameter: (group, index)
            for group, parameters in enumerate(optimizer.bf16_groups)
            for index, parameter in enumerate(parameters)
        }
        device = next((parameter.device for parameter in self.places), None)
        self.always = torch.ones((), dtype=torch.int32, device=device)
        self.replays_are_first, self.replay_flag = True, self.always.clone()

    def of(self, parameter: nn.Parameter) -> Tensor:
        """Returns a parameter's sum, flat."""
        group, index = self.places[parameter]
        return self.optimizer.fp32_groups_gradients[group][index]

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        """Returns whether this step has added a gradient to a parameter's sum."""
        group, index = self.places[parameter]
        return self.optimizer.fp32_groups_has_gradients[group][index]

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Adds a gradient to a parameter's sum."""
        is_first = None if self.has_gradient(parameter) else self.always
        add_to_sum(self.of(parameter), gradient, is_first)
        self.note(parameter)

    def note(self, parameter: nn.Parameter) -> None:
        """Does what DeepSpeed does when a gradient has been added."""
        group, index = self.places[parameter]
        self.optimizer.fp32_groups_has_gradients[group][index] = True
        parameter._hp_grad = self.of(parameter)
        if self.when_added is not None:
            self.when_added(parameter)

    def capture(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Launches in a capture what each replay does: adds to the sum, or to zeros."""
        add_to_sum(self.of(parameter), gradient, self.replay_flag)

    def before_replay(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sets the flag for a replay that adds to these parameters' sums. It changes once or twice
        a step: with the second micro-batch, and back with the first."""
        without = [p for p in parameters if not self.has_gradient(p)]
        is_first = len(without) == len(parameters)
        if not is_first:
            _fill_with_zeros([self.of(p) for p in without])
        if is_first != self.replays_are_first:
            self.replays_are_first = is_first
            self.replay_flag.fill_(is_first)

    def complete(self) -> None:
        """Makes all sums readable: fills those without a gradient with zeros."""
        _fill_with_zeros([self.of(p) for p in self.places if not self.has_gradient(p)])

    def forget(self) -> None:
        """Begins a new step."""
        self.optimizer.fp32_groups_has_gradients[:] = [
            [False] * len(parameters) for parameters in self.optimizer.bf16_groups
        ]


def _fill_with_zeros(sums: list[Tensor]) -> None:
    if sums:
        torch._foreach_zero_([total.detach() for total in sums])


def add_gradients_at_once(
    engine: Any, when_added: Callable[[nn.Parameter], None] | None = None
) -> GradientSums:
    """Lets each gradient of a DeepSpeed engine with a `BF16_Optimizer` be added to its sum as soon
    as it exists. To be called when the engine's other reductions of gradients are in place."""
    optimizer = engine.optimizer
    sums = GradientSums(optimizer, when_added)
    # DeepSpeed has a switch for this, which GPT-NeoX's settings do not reach.
    if not optimizer.immediate_grad_update:
        optimizer.immediate_grad_update = True
        engine._config.bfloat16_config.immediate_grad_update = True
        optimizer.create_grad_acc_hooks()

    @overrides(optimizer, "_update_hp_grad")
    @torch.no_grad()
    def add_in_one_kernel(_: Callable, lp: nn.Parameter, *others: Any, **options: Any) -> None:
        if lp.grad is not None:
            sums.add(lp, lp.grad)

    @overrides(optimizer, "clear_hp_grads")
    def forget(_: Callable) -> None:
        sums.forget()

    @overrides(engine, "buffered_allreduce_fallback")
    def complete_and_reduce(reduce: Callable, *args: Any, **kwargs: Any) -> None:
        sums.complete()  # after the last micro-batch, for a single rank too
        reduce(*args, **kwargs)

    return sums
