"""A step of a whole decoder in one launch against the model's own layers in float64."""

import copy

import pytest
import torch

from megatron_patch.hf import MetaLACache, MetaLAConfig, MetaLAForCausalLM
from megatron_patch.hf.decoding_metala import _kernel
from megatron_patch.ops.triton import decoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = dict(
    vocab_size=300, decoder_embed_dim=48, decoder_layers=2, decoder_attention_heads=3, glu_dim=80
)
# With the widths of real models, on a GPU.
WIDE = dict(decoder_embed_dim=1024, decoder_attention_heads=8, glu_dim=2816, decoder_layers=2)
WIDER = dict(decoder_embed_dim=2048, decoder_attention_heads=16, glu_dim=5632, decoder_layers=2)
WIDEST = dict(decoder_embed_dim=3072, decoder_attention_heads=24, glu_dim=8192, decoder_layers=2)
GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


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


def decode(model, exact, steps: int = 2) -> tuple[torch.Tensor, ...]:
    """Relative errors, over some steps behind a prompt, of the kernel and of the model's layers:
    of the logits, and of all states at the end."""
    ids = torch.randint(model.config.vocab_size, (1, 7), device=DEVICE)
    caches = [MetaLACache(model.config) for _ in range(3)]
    for cache, reader in zip(caches, (model, model, exact), strict=True):
        reader(ids, past_key_values=cache)
    dtype = model.lm_head.weight.dtype
    states = [(conv.to(dtype), state) for conv, state in states_of(caches[0])]
    kernel = _kernel(model, states)
    errors = []
    for token in torch.randint(model.config.vocab_size, (steps, 1, 1), device=DEVICE):
        kernel.x.copy_(model.model.embed(token)[0, 0])
        kernel.logits.fill_(float("nan"))
        kernel.step()
        plain, wanted = (
            reader(token, past_key_values=cache).logits[0, 0].double()
            for reader, cache in zip((model, exact), caches[1:], strict=True)
        )
        errors.append(
            [(x - wanted).norm() / wanted.norm() for x in (kernel.logits.double(), plain)]
        )
    logits = torch.tensor(errors).max(0).values
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
    return *logits, *torch.tensor(errors).max(0).values


def check(dtype: torch.dtype, **sizes) -> None:
    kernel, plain, kernel_states, plain_states = decode(*build(dtype, **sizes))
    floor = 1e-5 if dtype == torch.float32 else 1e-3
    assert kernel <= 1.5 * plain + floor
    assert kernel_states <= 1.5 * plain_states + floor


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, dict(decoder_embed_dim=96, decoder_attention_heads=6, glu_dim=200)),
        # Rows that begin at no multiple of 16 bytes.
        (torch.bfloat16, dict(decoder_embed_dim=36, glu_dim=50, vocab_size=301)),
        (torch.float16, dict(norm_type="rmsnorm")),
        (torch.float32, dict(norm_type="rmsnorm", bias=True)),
        (torch.float32, dict(self_augmentation=False, conv_width=2)),
        (torch.float32, dict(conv_width=1, no_scale_embedding=False, tau=1.0)),
    ],
)
def test_a_step_is_the_models_own(dtype, options):
    check(dtype, **{**SMALL, **options})


def test_shares_larger_than_a_programs_registers(monkeypatch):
    """Every weight is then read in several turns."""
    monkeypatch.setattr(decoder, "BYTES", 1)
    monkeypatch.setattr(decoder, "PROGRAMS_INTERPRETED", 3)
    check(torch.float32, **SMALL)


def test_long_rows_are_shared_by_warps(monkeypatch):
    monkeypatch.setattr(decoder, "LONG_ROW", 64)
    check(torch.float32, **SMALL)


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [WIDE, WIDER, WIDEST])
def test_widths_of_real_models(sizes, dtype):
    check(dtype, **sizes)


def test_two_runs_give_equal_bits():
    model, _ = build(torch.float32, **SMALL)
    results = []
    for _ in range(2):
        states = [
            (torch.linspace(-1, 1, 144, device=DEVICE).view(1, 48, 3),
             torch.linspace(-1, 1, 384, device=DEVICE).view(1, 3, 8, 16))
            for _ in range(2)
        ]  # fmt: skip
        kernel = _kernel(model, states)
        for token in (5, 7):
            kernel.x.copy_(model.model.embed_tokens.weight[token])
            kernel.step()
        results.append([kernel.logits.clone(), *(x for pair in states for x in pair)])
    assert all(map(torch.equal, *results))


def no_kernel(change, **sizes) -> bool:
    model, _ = build(torch.float32, **{**SMALL, **sizes})
    change(model)
    cache = MetaLACache(model.config)
    model(torch.zeros(1, 1, dtype=torch.long, device=DEVICE), past_key_values=cache)
    return _kernel(model, states_of(cache)) is None


def test_where_there_is_no_kernel():
    def bias_of_ones_own(model):
        model.lm_head.bias = torch.nn.Parameter(torch.ones(300, device=DEVICE))

    def transposed(model):
        weight = model.model.layers[0].channel_mixer.l1.weight
        weight.data = weight.data.T.contiguous().T

    def shifted(model):
        weight = model.lm_head.weight
        weight.data = torch.cat([weight.new_zeros(1), weight.data.flatten()])[1:].view_as(weight)

    assert not no_kernel(lambda model: None)
    assert no_kernel(bias_of_ones_own)
    assert no_kernel(transposed)
    assert no_kernel(shifted)
    assert no_kernel(lambda model: None, decoder_embed_dim=512, decoder_attention_heads=1)


def test_more_heads_than_programs(monkeypatch):
    monkeypatch.setattr(decoder, "_programs", lambda device: 2)
    assert no_kernel(lambda model: None)
