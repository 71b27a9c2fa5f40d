"""One sequence over several ranks: outputs, gradients and messages against one rank's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_patch.ops import meta_linear_attention, short_convolution
from megatron_patch.ops.context_parallel import incoming_rows, incoming_state
from tests.ranks import on_ranks

B, H, K, V, W = 2, 3, 4, 5, 4
D = 2 * H * (K + V)


def inputs(time: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a mixer's core takes, and the gradient of its output. Some decays are almost 0."""
    torch.manual_seed(time)
    shapes = dict(x=(B, time, D), weight=(D, 1, W), aug=(H, K), bias=(H, V), d_out=(B, time, H, V))
    made = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    made["x"] *= 1 + 30 * (torch.rand(B, time, 1) < 0.1)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def core(x, weight, aug, bias, group=None):
    """Convolution, then the operator, as the mixer calls them."""
    rows = None if group is None else incoming_rows(x, W - 1, group)
    projected, _ = short_convolution(x, weight, initial_state=rows, activation=None)
    q, gates, v, out_gate = projected.unflatten(-1, (H, -1)).split([K, K, V, V], -1)
    state = None if group is None else incoming_state(gates, v, 16.0, group)
    out, _ = meta_linear_attention(
        q, gates, v, aug, out_gate, out_gate_bias=bias, initial_state=state
    )
    return out


def run(d_out, group=None, **tensors):
    """The output and the gradients of all inputs."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out = core(**leaves, group=group)
    out.backward(d_out)
    return [out.detach(), *(leaf.grad for leaf in leaves.values())]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("time", [12, 512])
def test_ranks_compute_what_one_computes(ranks, time):
    """In float64, to 1e-10 of the largest entry: the output and the gradients of each rank's
    tokens, and the sum over ranks of the gradients of parameters."""

    def code(rank):
        whole = inputs(time, torch.float64)
        expected = run(**whole)
        part = slice(rank * time // ranks, (rank + 1) * time // ranks)
        own = {name: whole[name][:, part] for name in ("x", "d_out")}
        found = run(**{**whole, **own}, group=dist.group.WORLD)
        for gradient in found[2:]:
            dist.all_reduce(gradient)
        expected[:2] = [tensor[:, part] for tensor in expected[:2]]
        return [
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(found, expected, strict=True)
        ]

    assert max(max(errors) for errors in on_ranks(ranks, code)) < 1e-10


def test_a_rank_without_a_gradient_of_its_own_passes_gradients_on():
    """The loss is that of the last rank's last token: the gradient of the first rank's tokens comes
    through the state alone."""

    def code(rank):
        whole = inputs(24, torch.float64)
        whole["d_out"][:, :-1] = 0
        expected = run(**whole)[1]
        part = slice(rank * 6, rank * 6 + 6)
        own = {name: whole[name][:, part] for name in ("x", "d_out")}
        found = run(**{**whole, **own}, group=dist.group.WORLD)[1]
        return [(found - expected[:, part]).abs().max().item(), found.abs().max().item()]

    for error, size in on_ranks(4, code):
        assert error < 1e-12 < 1e-6 < size


def test_bfloat16_states_are_handed_on_in_float32():
    def code(rank):
        whole = inputs(256, torch.bfloat16)
        _, gates, v, _ = whole["x"].unflatten(-1, (H, -1)).split([K, K, V, V], -1)
        part = slice(rank * 128, rank * 128 + 128)
        found = incoming_state(gates[:, part], v[:, part], 16.0, dist.group.WORLD)
        _, expected = meta_linear_attention(
            gates[:, :128].double(), gates[:, :128].double(), v[:, :128].double(),
            output_final_state=True,
        )  # fmt: skip
        assert found.dtype == torch.float32
        return ((found - rank * expected).abs().max() / expected.abs().max()).item()

    assert max(on_ranks(2, code)) < 1e-6


def test_messages_do_not_grow_with_the_length():
    """Bytes that a rank gives, in both passes: a state, its decay and W - 1 rows; then the
    gradients of the state and the rows."""

    def code(rank):
        sent = []
        gather = dist.all_gather_into_tensor

        def counted(output, given, group):
            sent.append(given.nbytes)
            return gather(output, given, group=group)

        dist.all_gather_into_tensor = counted
        found = []
        for time in (16, 256):
            whole = inputs(time, torch.float32)
            whole.pop("d_out")
            sent.clear()
            leaves = {name: tensor.requires_grad_() for name, tensor in whole.items()}
            core(**leaves, group=dist.group.WORLD).sum().backward()
            found.append(list(sent))
        return found

    rows, state = 4 * B * D * (W - 1), 4 * B * H * K * V
    for found in on_ranks(2, code):
        assert found == [[rows, state + 4 * B * H * K, state, rows]] * 2
