"""One sequence over several ranks: outputs, gradients and messages against one rank's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_patch.ops import meta_linear_attention, short_convolution
from megatron_patch.ops.context_parallel import ContextParallel, incoming_rows, incoming_state
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


def core(x, weight, aug, bias, group=None, cu_seqlens=None, backend="auto"):
    """Convolution, then the operator, as the mixer calls them."""
    rows = context = None
    batch = 1 if cu_seqlens is not None else B
    if group is not None:
        rows, context = incoming_rows(x, W - 1, group, cu_seqlens), ContextParallel(group, B)
    projected, _ = short_convolution(
        x.reshape(batch, -1, D),
        weight,
        initial_state=rows,
        activation=None,
        cu_seqlens=cu_seqlens,
    )
    heads = projected.unflatten(-1, (H, -1))
    q, gates, v, out_gate = heads.split([K, K, V, V], -1)
    out, _ = meta_linear_attention(
        q, gates, v, aug, out_gate,
        out_gate_bias=bias, context=context, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip
    return out.view(B, -1, H, V)


def boundaries(starts, rank, ranks, time):
    """`cu_seqlens` of a rank's part of B rows, whose documents begin at `starts`."""
    length = time // ranks
    begin, found = rank * length, []
    for row, tokens in enumerate(starts):
        inside = [row * length + t - begin for t in tokens if begin <= t < begin + length]
        found += inside if rank == 0 else [row * length, *inside]
    return torch.tensor([*found, B * length])


def run(d_out, tensors, **options):
    """The output and the gradients of all inputs."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out = core(**leaves, **options)
    out.backward(d_out)
    return [out.detach(), *(leaf.grad for leaf in leaves.values())]


# (T, where the documents of B rows begin). Four ranks' parts of 24 tokens begin at 0, 6, 12, 18.
CASES = [
    (12, None),
    (512, None),
    (24, [(0, 12), (0, 6, 18)]),  # at the edges of parts
    (24, [(0, 5, 13, 19), (0, 4, 8, 11, 14, 17, 20)]),  # within W - 1 tokens of them
    (24, [(0, 5), (0, 20)]),  # documents over three and four parts
    (24, [range(24), (0, 10, 11, 12, 13, 23)]),  # documents of one token
    (24, [(0,), (0,)]),
]


def errors(rank, ranks, time, starts, dtype=torch.float64, backend="auto"):
    """How far each result of a rank is from that of one rank, by the largest entry: the output, the
    gradient of the rank's tokens, and the sums over ranks of the gradients of parameters."""
    bounds = [None, None]
    if starts is not None:
        bounds = [boundaries(starts, *place, time) for place in ((0, 1), (rank, ranks))]
    whole = inputs(time, dtype)
    exact = {name: tensor.double() for name, tensor in whole.items()}
    expected = run(exact.pop("d_out"), exact, cu_seqlens=bounds[0])
    part = slice(rank * time // ranks, (rank + 1) * time // ranks)
    whole["x"] = whole["x"][:, part]
    d_out, group = whole.pop("d_out")[:, part], dist.group.WORLD
    found = run(d_out, whole, group=group, cu_seqlens=bounds[1], backend=backend)
    for gradient in found[2:]:
        dist.all_reduce(gradient)
    expected[:2] = [tensor[:, part] for tensor in expected[:2]]
    return [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_what_one_computes(ranks):
    """In float64, to 1e-10."""
    for found in on_ranks(ranks, lambda rank: [errors(rank, ranks, *case) for case in CASES]):
        assert max(map(max, found)) < 1e-10, found


def test_a_rank_without_a_gradient_of_its_own_passes_gradients_on():
    """The loss is that of the last rank's last token: the gradient of the first rank's tokens comes
    through the state alone."""

    def code(rank):
        whole = inputs(24, torch.float64)
        whole["d_out"][:, :-1] = 0
        d_out = whole.pop("d_out")
        expected = run(d_out, whole)[1]
        part = slice(rank * 6, rank * 6 + 6)
        own = {**whole, "x": whole["x"][:, part]}
        found = run(d_out[:, part], own, group=dist.group.WORLD)[1]
        return [(found - expected[:, part]).abs().max().item(), found.abs().max().item()]

    for error, size in on_ranks(4, code):
        assert error < 1e-12 < 1e-6 < size


def test_bfloat16_states_are_handed_on_in_float32():
    def code(rank):
        whole = inputs(256, torch.bfloat16)
        _, gates, v, _ = whole["x"].unflatten(-1, (H, -1)).split([K, K, V, V], -1)
        part = slice(rank * 128, rank * 128 + 128)
        context = ContextParallel(dist.group.WORLD, B)
        found = incoming_state(gates[:, part], v[:, part], 16.0, context)
        _, expected = meta_linear_attention(
            gates[:, :128].double(), gates[:, :128].double(), v[:, :128].double(),
            output_final_state=True,
        )  # fmt: skip
        assert found.dtype == torch.float32
        return ((found - rank * expected).abs().max() / expected.abs().max()).item()

    assert max(on_ranks(2, code)) < 1e-6


def test_messages_do_not_grow_with_the_length():
    """Bytes that a rank gives, in both passes: a state and its decay, or the gradient of the state
    and the decay, and W - 1 rows. Nor with the documents."""

    def code(rank):
        sent = []
        gather = dist.all_gather_into_tensor

        def counted(output, given, group):
            sent.append(given.nbytes)
            return gather(output, given, group=group)

        dist.all_gather_into_tensor = counted
        found = []
        for time, starts in ((16, None), (256, None), (256, [range(0, 256, 5)] * B)):
            bounds = None if starts is None else boundaries(starts, rank, 2, 2 * time)
            whole = inputs(time, torch.float32)
            whole.pop("d_out")
            sent.clear()
            leaves = {name: tensor.requires_grad_() for name, tensor in whole.items()}
            core(**leaves, group=dist.group.WORLD, cu_seqlens=bounds).sum().backward()
            found.append(list(sent))
        return found

    rows, state = 4 * B * D * (W - 1), 4 * B * H * K * (V + 1)
    for found in on_ranks(2, code):
        assert found == [[rows, state, state, rows]] * 3


def test_states_beside_ranks_are_refused():
    tensors = [torch.randn(1, 4, H, width) for width in (K, K, V)]
    with pytest.raises(ValueError, match="context: found with a state, wanted neither"):
        meta_linear_attention(
            *tensors, context=ContextParallel(None, 1), output_final_state=True, backend="chunked"
        )
