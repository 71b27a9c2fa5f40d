"""Steps of a whole decoder by a kernel against the model's own layers in float64."""

from __future__ import annotations

import copy

import torch

from megatron_patch.hf import MetaLACache, MetaLAConfig, MetaLAForCausalLM
from megatron_patch.hf.decoding_metala import _kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = dict(
    vocab_size=300, decoder_embed_dim=48, decoder_layers=2, decoder_attention_heads=3, glu_dim=80
)
# With the widths of real models, on a GPU.
WIDE = dict(decoder_embed_dim=1024, decoder_attention_heads=8, glu_dim=2816, decoder_layers=2)
WIDER = dict(decoder_embed_dim=2048, decoder_attention_heads=16, glu_dim=5632, decoder_layers=2)
WIDEST = dict(decoder_embed_dim=3072, decoder_attention_heads=24, glu_dim=8192, decoder_layers=2)


def build(dtype: torch.dtype, **sizes) -> tuple[MetaLAForCausalLM, MetaLAForCausalLM]:
    """A model whose every weight matters, and the same in float64."""
    torch.manual_seed(0)
    model = MetaLAForCausalLM(MetaLAConfig(**sizes)).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    model = model.to(DEVICE, dtype)
    return model, copy.deepcopy(model).double()


def states_of(cache: MetaLACache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [cache.states(layer) for layer in range(len(cache))]


def logits_of(kernel, model, token: torch.Tensor) -> torch.Tensor:
    """Of a kernel's step behind those before."""
    head = model.lm_head.weight
    logits = torch.full((len(head),), float("nan"), dtype=head.dtype, device=DEVICE)
    kernel.step(token, logits)
    return logits


def decode(model, exact, kind: type, steps: int) -> tuple[torch.Tensor, ...]:
    """Relative errors, over some steps behind a prompt, of the kernel and of the model's layers:
    of the logits, and of all states at the end."""
    ids = torch.randint(model.config.vocab_size, (1, 7), device=DEVICE)
    caches = [MetaLACache(model.config) for _ in range(3)]
    for cache, reader in zip(caches, (model, model, exact), strict=True):
        reader(ids, past_key_values=cache)
    dtype = model.lm_head.weight.dtype
    states = [(conv.to(dtype), state) for conv, state in states_of(caches[0])]
    kernel = _kernel(model, states)
    assert type(kernel) is kind
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


def check(kind: type, dtype: torch.dtype, steps: int = 2, **sizes) -> None:
    """That a kernel of such a class makes the model's own steps."""
    kernel, plain, kernel_states, plain_states = decode(*build(dtype, **sizes), kind, steps)
    floor = 1e-5 if dtype == torch.float32 else 1e-3
    assert kernel <= 1.5 * plain + floor
    assert kernel_states <= 1.5 * plain_states + floor


def two_runs(dtype: torch.dtype, **sizes) -> list[list[torch.Tensor]]:
    """Logits and states of two runs from the same states of a model like SMALL."""
    model, _ = build(dtype, **sizes)
    results = []
    for _ in range(2):
        states = [
            (torch.linspace(-1, 1, 144, device=DEVICE).view(1, 48, 3).to(dtype),
             torch.linspace(-1, 1, 384, device=DEVICE).view(1, 3, 8, 16))
            for _ in range(2)
        ]  # fmt: skip
        kernel = _kernel(model, states)
        logits = [logits_of(kernel, model, token) for token in torch.tensor([5, 7], device=DEVICE)]
        results.append([*logits, *(x for pair in states for x in pair)])
    return results
