"""The decoder in CUDA C++: that it compiles for the models of configs/, and on a GPU its steps."""

import copy
import re
from pathlib import Path

import pytest
import torch
import yaml

from megatron_patch.hf import MetaLACache
from megatron_patch.hf.decoding_metala import make_token_decoder
from megatron_patch.ops.backends import import_failure
from megatron_patch.ops.decoding.token_decoder import LayerTensors
from tests.ops.decoder_steps import (
    DEVICE,
    SMALL,
    WIDE,
    WIDER,
    WIDEST,
    build,
    check,
    logits_of,
    states_of,
    two_runs,
)

if import_failure("megatron_patch.ops.hopper.compilation") is not None:
    pytest.skip("cuda-bindings is not installed", allow_module_level=True)
from megatron_patch.ops.decoding import decoder
from megatron_patch.ops.hopper import compilation

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").glob("metala_*.yml"))
SERVED = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GPU = pytest.mark.skipif(not SERVED, reason="needs a GPU of compute capability 9.0")
COMPILER = pytest.mark.skipif(
    90 not in compilation.known_architectures(), reason="NVIDIA's runtime compiler is not installed"
)
MODEL = {**SMALL, "glu_dim": 200}
# Of an H100, and of an H200.
GPU_NUMBERS = dict(multiprocessors=132, shared_bytes=227 * 1024)


def misfit(dim: int, heads: int, inner: int, ratio: int = 2, **gpu) -> str | None:
    """Of heads whose V is `ratio` K."""
    value_width = dim // heads
    return decoder.misfit(
        dim=dim, heads=heads, key_width=value_width // ratio, value_width=value_width, inner=inner,
        **{**GPU_NUMBERS, **gpu},
    )  # fmt: skip


def compiles(dtype: torch.dtype, layers: int, taps: int, multiprocessors: int, **widths) -> None:
    gpu = {**GPU_NUMBERS, "multiprocessors": multiprocessors}
    assert misfit(**widths, multiprocessors=multiprocessors) is None
    numbers = decoder.numbers_of(
        layers=layers, taps=taps, vocabulary=50304, dtype=dtype, **widths, **gpu
    )
    assert compilation.compile_code(decoder.SOURCE, "sm_90a", **numbers).startswith(b"\x7fELF")


@COMPILER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_compiles_for(path, dtype):
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    widths = dict(
        dim=settings["hidden_size"],
        heads=settings["num_attention_heads"],
        inner=settings["intermediate_size"],
    )
    compiles(dtype, settings["num_layers"], taps=4, multiprocessors=132, **widths)


@COMPILER
@pytest.mark.parametrize(
    "widths",
    [
        dict(dim=8, heads=1, inner=64),
        dict(dim=176, heads=1, inner=8192),
        dict(dim=4096, heads=64, inner=8192),
        dict(dim=4096, heads=24 + 8, inner=64),
        dict(dim=3000, heads=25, inner=8184),
    ],
)
def test_it_compiles_for_all_that_fits(widths):
    compiles(torch.bfloat16, layers=96, taps=8, multiprocessors=64, **widths)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(shared_bytes=99 * 1024), "found 132 multiprocessors with 99 KB .* wanted 64"),
        (dict(multiprocessors=16), "found 16 multiprocessors .* wanted 64"),
        (dict(multiprocessors=3000), "wanted heads ≤ 3000 multiprocessors ≤ F"),
        (dict(heads=256), "256 heads .* wanted heads ≤ 132"),
        (dict(heads=2), "K = 256 and V = 512, wanted .* K V ≤ 16384"),
        (dict(dim=8192), "found D = 8192, .* wanted D ≤ 4096"),
        (dict(inner=11008), "F = 11008, .* F ≤ 8192"),
        (dict(inner=2820), "F = 2820, .* multiples of 8"),
        (dict(ratio=1), r"K = 128 and V = 128, wanted V = 2 K"),
        (dict(ratio=4), r"K = 32 and V = 128, wanted V = 2 K"),
    ],
)
def test_what_does_not_fit(change, reason):
    model = dict(dim=1024, heads=8, inner=2816)
    assert misfit(**model) is None
    assert re.search(reason, misfit(**{**model, **change}))


def test_the_table_has_the_same_fields():
    """Between Python and CUDA there is only their order."""
    layout = Path(decoder.__file__).with_name("layout.cuh").read_text(encoding="utf-8")
    names = re.search(r"enum Field {(.*?)}", layout, re.DOTALL)[1].lower().split(",")
    assert [name.strip().removesuffix("_projection") for name in names] == [
        *LayerTensors._fields,
        "fields",
    ]


def test_the_kernel_has_the_same_arguments():
    path = Path(decoder.__file__).with_name("arguments.cuh")
    fields = path.read_text(encoding="utf-8").split("struct Arguments {")[1].split("__device__")[0]
    names = re.findall(r"(\w+)[,;]", re.sub(r"//.*", "", fields))
    assert names == [name for name, _ in decoder.Arguments._fields_]


@COMPILER
def test_what_does_not_compile_is_said():
    with pytest.raises(RuntimeError, match="decoder.cu does not compile with .*LAYERS"):
        compilation.compile_code(decoder.SOURCE, "sm_90a", LAYERS=1)


@GPU
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        # Heads that do not fit the part of a warp; more layers, of an odd number.
        (torch.bfloat16, dict(decoder_embed_dim=96, decoder_attention_heads=6)),
        (torch.bfloat16, dict(decoder_embed_dim=80, glu_dim=328, decoder_attention_heads=5)),
        (torch.bfloat16, dict(decoder_layers=5, decoder_attention_heads=1)),
        (torch.float16, dict(norm_type="rmsnorm")),
        (torch.float16, dict(norm_type="rmsnorm", bias=True)),
        (torch.float16, dict(self_augmentation=False, conv_width=2)),
        (torch.float16, dict(conv_width=1, no_scale_embedding=False, tau=1.0)),
        (torch.bfloat16, dict(no_scale_embedding=False, tie_word_embeddings=True)),
    ],
)
def test_a_step_is_the_models_own(dtype, options):
    check(decoder.Decoder, dtype, steps=5, **{**MODEL, **options})


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [WIDE, WIDER, WIDEST])
def test_widths_of_real_models(sizes, dtype):
    check(decoder.Decoder, dtype, steps=5, **sizes)


@GPU
def test_two_runs_give_equal_bits():
    assert all(map(torch.equal, *two_runs(torch.bfloat16, **MODEL)))


@GPU
def test_many_steps_give_equal_bits():
    """Blocks that wait for each other wrongly would do so in one of many steps."""
    model, _ = build(torch.bfloat16, **{**WIDE, "decoder_layers": 7, "vocab_size": 1000})
    results = []
    for _ in range(2):
        cache = MetaLACache(model.config)
        model(torch.zeros(1, 4, dtype=torch.long, device=DEVICE), past_key_values=cache)
        states = [(conv.to(torch.bfloat16), state) for conv, state in states_of(cache)]
        kernel = make_token_decoder(model, states)
        for token in torch.arange(500, device=DEVICE):
            logits = logits_of(kernel, model, token)
        results.append([logits, *(x for pair in states for x in pair)])
    assert results[0][0].isfinite().all()
    assert all(map(torch.equal, *results))


@GPU
def test_a_recorded_step():
    """In a CUDA graph it stays with the tensors that it was recorded with."""
    model, _ = build(torch.bfloat16, **MODEL)
    cache = MetaLACache(model.config)
    model(torch.zeros(1, 4, dtype=torch.long, device=DEVICE), past_key_values=cache)
    states = [(conv.to(torch.bfloat16), state) for conv, state in states_of(cache)]
    direct, recorded = (make_token_decoder(model, copy.deepcopy(states)) for _ in range(2))
    token = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    logits = torch.empty(1, 1, model.config.vocab_size, dtype=torch.bfloat16, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded.step(token, logits)
    for next_token in torch.arange(5, device=DEVICE):
        token.fill_(next_token)
        graph.replay()
        assert torch.equal(logits[0, 0], logits_of(direct, model, next_token))


@GPU
def test_the_embedding_is_the_models_own():
    """Scaled, with the model's own rounding: a step is that of the scaled embedding, bit by bit."""
    model, _ = build(torch.bfloat16, **MODEL, no_scale_embedding=False)
    results = []
    for _ in range(2):
        states = [
            (torch.zeros(1, 48, 3, dtype=torch.bfloat16, device=DEVICE),
             torch.zeros(1, 3, 8, 16, device=DEVICE))
            for _ in model.model.layers
        ]  # fmt: skip
        kernel = make_token_decoder(model, states)
        results.append(logits_of(kernel, model, torch.tensor(299, device=DEVICE)))
        weight = model.model.embed_tokens.weight
        weight.copy_(model.model.embed(torch.arange(300, device=DEVICE)))
        model.model.embed_scale = 1.0
    assert torch.equal(*results)


@GPU
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        # Rows that are no whole vectors; fewer rows than multiprocessors.
        (torch.bfloat16, dict(decoder_embed_dim=36)),
        (torch.bfloat16, dict(glu_dim=80)),
        (torch.bfloat16, dict(expand_k=1.0)),  # another K than V / 2
    ],
)
def test_where_triton_serves(dtype, options):
    from megatron_patch.ops.triton.decoder import Decoder

    check(Decoder, dtype, **{**MODEL, **options})


@GPU
def test_without_a_compiler_triton_serves(monkeypatch):
    from megatron_patch.ops import backends
    from megatron_patch.ops.triton.decoder import Decoder

    monkeypatch.setattr(backends, "_decided", {})
    monkeypatch.setattr(decoder, "known_architectures", lambda: ())
    check(Decoder, torch.bfloat16, **MODEL)
