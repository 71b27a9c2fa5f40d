"""Compares the steps of the decoding kernel with the model's own layers in float64."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from megatron_patch.hf import MetaLACache, MetaLAConfig, MetaLAForCausalLM
from megatron_patch.hf.decoding_metala import make_token_decoder
from megatron_patch.ops import meta_linear_attention, short_convolution, token_decoder
from megatron_patch.ops.decoding.decoder import Decoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = dict(
    vocab_size=300, decoder_embed_dim=48, decoder_layers=2, decoder_attention_heads=3, glu_dim=80
)
# The widths of real models.
WIDE = dict(decoder_embed_dim=1024, decoder_attention_heads=8, glu_dim=2816, decoder_layers=2)
WIDER = dict(decoder_embed_dim=2048, decoder_attention_heads=16, glu_dim=5632, decoder_layers=2)
WIDEST = dict(decoder_embed_dim=3072, decoder_attention_heads=24, glu_dim=8192, decoder_layers=2)


def build(dtype: torch.dtype, **sizes) -> tuple[MetaLAForCausalLM, MetaLAForCausalLM]:
    """Returns a model in which every weight matters, and the same model in float64."""
    torch.manual_seed(0)
    model = MetaLAForCausalLM(MetaLAConfig(**sizes)).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    model = model.to(DEVICE, dtype)
    return model, copy.deepcopy(model).double()


def tensors_of(
    dtype: torch.dtype, heads: int, key_width: int, value_width: int, inner: int, layers: int = 2
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns random tensors for `token_decoder`, for heads of any widths."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        x = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return x.to(DEVICE, dtype)

    dim, keys = heads * value_width, heads * key_width
    made = [
        dict(
            token_norm=draw(dim), convolution=draw(dim, 1, 4), q=draw(keys, dim),
            gate_logits=draw(keys, dim), v=draw(dim, dim), out_gate=draw(dim, dim),
            out_gate_bias=draw(dim), aug=draw(keys), out=draw(dim, dim), channel_norm=draw(dim),
            l1=draw(inner, dim), l1_bias=draw(inner), l2=draw(inner, dim), l2_bias=draw(inner),
            l3=draw(dim, inner), l3_bias=draw(dim), convolution_state=draw(1, dim, 3),
            state=draw(1, heads, key_width, value_width, dtype=torch.float32),
        )
        for _ in range(layers)
    ]  # fmt: skip
    for layer in made:
        for name in ("token_norm", "channel_norm"):
            layer[name] += 1
    return made, draw(300, dim), 1 + draw(dim), draw(300, dim)


NUMBERS = dict(embedding_scale=3.0, tau=2.0, scale=0.3, norm_eps=1e-6, output_norm_eps=1e-5)


def step_of_operators(layers, embedding, final_norm, head, token: int) -> torch.Tensor:
    """Returns the logits of a step by the operators in float64, with NUMBERS, and overwrites the
    states."""

    def norm(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, NUMBERS["norm_eps"])

    x = embedding[token].view(1, 1, -1) * NUMBERS["embedding_scale"]
    for y in layers:
        _, heads, key_width, width = y["state"].shape
        mixed, _ = short_convolution(
            norm(x, y["token_norm"]), y["convolution"], initial_state=y["convolution_state"],
            inplace_final_state=True, backend="torch",
        )  # fmt: skip
        tensors = [
            F.linear(mixed, y[name]).view(1, 1, heads, -1)
            for name in ("q", "gate_logits", "v", "out_gate")
        ]
        read_out, _ = meta_linear_attention(
            *tensors[:3], y["aug"].view(heads, key_width), tensors[3],
            out_gate_bias=y["out_gate_bias"].view(heads, width), tau=NUMBERS["tau"],
            scale=NUMBERS["scale"], norm_eps=NUMBERS["output_norm_eps"], initial_state=y["state"],
            inplace_final_state=True, backend="reference",
        )  # fmt: skip
        x = x + F.linear(read_out.flatten(2), y["out"])
        hidden = norm(x, y["channel_norm"])
        gate, up = (F.linear(hidden, y[name], y[f"{name}_bias"]) for name in ("l1", "l2"))
        x = x + F.linear(F.silu(gate) * up, y["l3"], y["l3_bias"])
    return F.linear(norm(x, final_norm), head)[0, 0]


def check_widths(dtype: torch.dtype, tolerance: float, *widths: int) -> None:
    """Checks the kernel's steps against the operators', for these heads, K, V and MLP."""
    layers, *others = tensors_of(dtype, *widths)
    exact = [{name: x.double() for name, x in layer.items()} for layer in layers]
    doubles = [x.double() for x in others]
    kernel = token_decoder(layers, *others, **NUMBERS)
    assert type(kernel) is Decoder
    for token in (7, 250):
        logits = torch.full((300,), float("nan"), dtype=dtype, device=DEVICE)
        kernel.step(torch.tensor([token], device=DEVICE), logits)
        pairs = [(logits, step_of_operators(exact, *doubles, token))]
    for layer, wanted in zip(layers, exact, strict=True):
        pairs += [(layer[name], wanted[name]) for name in ("state", "convolution_state")]
    for found, wanted in pairs:
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def states_of(cache: MetaLACache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [cache.states(layer) for layer in range(len(cache))]


def logits_of(kernel, model, token: torch.Tensor) -> torch.Tensor:
    """Returns the logits of the kernel's next step."""
    head = model.lm_head.weight
    logits = torch.full((len(head),), float("nan"), dtype=head.dtype, device=DEVICE)
    kernel.step(token, logits)
    return logits


def decode(model, exact, steps: int) -> tuple[torch.Tensor, ...]:
    """Decodes some steps after a prompt. Returns the relative errors of the kernel's logits, the
    layers' logits, the kernel's final states and the layers' final states."""
    ids = torch.randint(model.config.vocab_size, (1, 7), device=DEVICE)
    caches = [MetaLACache(model.config) for _ in range(3)]
    for cache, reader in zip(caches, (model, model, exact), strict=True):
        reader(ids, past_key_values=cache)
    dtype = model.lm_head.weight.dtype
    states = [(conv.to(dtype), state) for conv, state in states_of(caches[0])]
    kernel = make_token_decoder(model, states)
    assert type(kernel) is Decoder
    errors = []
    for token in torch.randint(model.config.vocab_size, (steps, 1, 1), device=DEVICE):
        logits = logits_of(kernel, model, token).double()
        plain, wanted = (
            reader(token, past_key_values=cache).logits[0, 0].double()
            for reader, cache in zip((model, exact), caches[1:], strict=True)
        )
        errors.append([(x - wanted).norm() / wanted.norm() for x in (logits, plain)])
    of_logits = torch.tensor(errors).max(0).values
    errors = [
        [(x.double() - wanted).norm() / wanted.norm() for x in found]
        for *found, wanted in zip(
            *(
                [x for pair in pairs for x in pair]
                for pairs in (states, *map(states_of, caches[1:]))
            ),
            strict=True,
        )
        if wanted.numel()
    ]
    return *of_logits, *torch.tensor(errors).max(0).values


def check(dtype: torch.dtype, steps: int, **sizes) -> None:
    """Checks that the kernel's steps are about as exact as those of the model's layers."""
    kernel, plain, kernel_states, plain_states = decode(*build(dtype, **sizes), steps)
    assert kernel <= 1.5 * plain + 1e-3
    assert kernel_states <= 1.5 * plain_states + 1e-3


def two_runs(dtype: torch.dtype, **sizes) -> list[list[torch.Tensor]]:
    """Returns the logits and states of two runs from the same states, of a model like SMALL."""
    model, _ = build(dtype, **sizes)
    results = []
    for _ in range(2):
        states = [
            (torch.linspace(-1, 1, 144, device=DEVICE).view(1, 48, 3).to(dtype),
             torch.linspace(-1, 1, 384, device=DEVICE).view(1, 3, 8, 16))
            for _ in range(2)
        ]  # fmt: skip
        kernel = make_token_decoder(model, states)
        logits = [logits_of(kernel, model, token) for token in torch.tensor([5, 7], device=DEVICE)]
        results.append([*logits, *(x for pair in states for x in pair)])
    return results
