"""The reference recurrence, the oracle of every backend, against formulas written another way."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_patch.ops import meta_linear_attention
from tests.ops.cases import make_leaves


def explicit_operator(
    q, gate_logits, v, aug, out_gate, out_gate_bias, initial_state, tau, scale, norm_eps
):
    """Computes MetaLA as attention over all pairs of tokens, from the definitions of sigmoid and
    variance. The decay is sigmoid(a) ** (1 / tau), and products of decays are products."""
    T = q.shape[1]
    decay = (1 / (1 + torch.exp(-gate_logits))) ** (1 / tau)
    key = 1 - decay
    # products[b, i, j] = prod(decay[j + 1 .. i]), zero for j > i.
    products = q.new_zeros(q.shape[0], T, T, *q.shape[2:])
    for j in range(T):
        products[:, j, j] = 1
        for i in range(j + 1, T):
            products[:, i, j] = products[:, i - 1, j] * decay[:, i]
    read_out = torch.einsum("bihk,bijhk,bjhk,bjhv->bihv", q, products, key, v)
    since_start = products[:, :, 0] * decay[:, :1]
    read_out = read_out + torch.einsum("bihk,bihk,bhkv->bihv", q, since_start, initial_state)
    aug_score = torch.einsum("bthk,hk,bthk->bth", q, aug, key)
    y = scale * read_out + 1 / (1 + torch.exp(-aug_score[..., None] * v))
    centred = y - y.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + norm_eps)
    z = out_gate + out_gate_bias
    final_state = torch.einsum("bjhk,bjhk,bjhv->bhkv", products[:, -1], key, v)
    final_state = final_state + since_start[:, -1, :, :, None] * initial_state
    return z / (1 + torch.exp(-z)) * normed, final_state


@pytest.mark.parametrize(
    ("B", "T", "H", "K", "V"), [(1, 1, 1, 1, 2), (2, 2, 1, 3, 5), (2, 19, 3, 8, 6)]
)
def test_equals_attention_over_all_pairs(B, T, H, K, V):
    inputs = make_leaves(B, T, H, K, V)
    settings = {"tau": 3.0, "scale": 0.7, "norm_eps": 1e-3}
    wanted = explicit_operator(**inputs, **settings)
    found = meta_linear_attention(
        **inputs, **settings, output_final_state=True, backend="reference"
    )
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_two_tokens_by_hand():
    """With K = 1, V = 2, tau = 1, a gate logit of 0 halves the state and admits half of v."""

    def token_and_head(values):
        return torch.tensor(values, dtype=torch.float64)[None, :, None]

    _, state = meta_linear_attention(
        token_and_head([[1.0], [1.0]]),
        token_and_head([[0.0], [0.0]]),
        token_and_head([[8.0, 4.0], [2.0, 0.0]]),
        tau=1.0,
        output_final_state=True,
        backend="reference",
    )
    # S_1 = (8, 4) / 2 = (4, 2); S_2 = S_1 / 2 + (2, 0) / 2 = (3, 1).
    assert state.tolist() == [[[[3.0, 1.0]]]]


def test_defaults_are_those_of_the_paper():
    inputs = make_leaves(K=7)
    default = meta_linear_attention(**inputs, backend="reference")[0]
    spelled_out = meta_linear_attention(
        **inputs, tau=16.0, scale=1 / math.sqrt(7), norm_eps=1e-5, backend="reference"
    )[0]
    torch.testing.assert_close(default, spelled_out, rtol=1e-12, atol=1e-12)


def test_without_gate_bias_and_augmentation():
    """A part left out equals a part that does nothing."""
    inputs = make_leaves(T=5)
    q, gate_logits, v = inputs["q"], inputs["gate_logits"], inputs["v"]
    ungated = meta_linear_attention(q, gate_logits, v, inputs["aug"], backend="reference")[0]
    gated = meta_linear_attention(
        q, gate_logits, v, inputs["aug"], inputs["out_gate"], backend="reference"
    )[0]
    torch.testing.assert_close(gated, torch.nn.functional.silu(inputs["out_gate"]) * ungated)
    # aug = 0 adds sigmoid(0) to all of V, which the LayerNorm takes away again.
    torch.testing.assert_close(
        meta_linear_attention(q, gate_logits, v, backend="reference")[0],
        meta_linear_attention(
            q, gate_logits, v, torch.zeros_like(inputs["aug"]), backend="reference"
        )[0],
    )


def test_gradients():
    inputs = make_leaves(1, 3, 1, 2, 3)

    def operator(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return meta_linear_attention(**named, output_final_state=True, backend="reference")

    assert torch.autograd.gradcheck(operator, tuple(inputs.values()))


def test_key_keeps_its_digits_where_the_gate_is_open():
    """At a = 16 and tau = 16, k = 1 - exp(g) is about 7e-9; a float32 difference would give 0."""
    one = torch.ones(1, 1, 1, 1)
    _, state = meta_linear_attention(
        one, 16 * one, one.expand(1, 1, 1, 2), output_final_state=True, backend="reference"
    )
    wanted = -math.expm1(-math.log1p(math.exp(-16)) / 16)
    torch.testing.assert_close(state, torch.full((1, 1, 1, 2), wanted), rtol=1e-6, atol=0)
