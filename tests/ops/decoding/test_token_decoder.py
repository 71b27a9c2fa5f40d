"""The one-launch decoder: it compiles for the models of configs/, it says which models it serves,
and on a GPU its steps are those of the model's own layers."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from megatron_patch.hf import MetaLACache
from megatron_patch.hf.decoding_metala import _unsupported_reason, make_token_decoder
from megatron_patch.ops import backends
from megatron_patch.ops.decoding import LayerTensors, token_decoder

if backends.import_failure("megatron_patch.ops.decoding.decoder") is not None:
    pytest.skip("cuda-bindings is not installed", allow_module_level=True)
from megatron_patch.ops.decoding import decoder
from megatron_patch.ops.hopper import nvrtc
from tests.ops.decoding.decoder_steps import (
    DEVICE,
    NUMBERS,
    SMALL,
    WIDE,
    WIDER,
    WIDEST,
    build,
    check,
    check_widths,
    logits_of,
    states_of,
    tensors_of,
    two_runs,
)

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").glob("metala_*.yml"))
SERVED = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GPU = pytest.mark.skipif(not SERVED, reason="needs a GPU of compute capability 9.0")
COMPILER = pytest.mark.skipif(
    90 not in nvrtc.known_architectures(), reason="NVIDIA's runtime compiler is not installed"
)
MODEL = {**SMALL, "glu_dim": 200}
# An H100 and an H200 have these.
GPU_NUMBERS = dict(multiprocessors=132, shared_bytes=227 * 1024)


def unsupported(dim: int, heads: int, inner: int, ratio: int = 2, **gpu) -> str | None:
    """Returns why heads with V = `ratio` K are not served."""
    value_width = dim // heads
    widths = dict(D=dim, H=heads, K=value_width // ratio, V=value_width, F=inner)
    return decoder.unsupported_sizes(**widths, **{**GPU_NUMBERS, **gpu})


def compiles(
    dtype: torch.dtype, layers: int, kernel_size: int, multiprocessors: int, **widths
) -> None:
    gpu = {**GPU_NUMBERS, "multiprocessors": multiprocessors}
    assert unsupported(**widths, multiprocessors=multiprocessors) is None
    macros = decoder.macros_for(
        layers=layers, kernel_size=kernel_size, vocabulary=50304, dtype=dtype, **widths, **gpu
    )
    assert nvrtc.compile_code(decoder.SOURCE, "sm_90a", **macros).startswith(b"\x7fELF")


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
    compiles(dtype, settings["num_layers"], kernel_size=4, multiprocessors=132, **widths)


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
    compiles(torch.bfloat16, layers=96, kernel_size=8, multiprocessors=64, **widths)


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
    assert unsupported(**model) is None
    assert re.search(reason, unsupported(**{**model, **change}))


def test_the_table_has_the_same_fields():
    """Python and CUDA agree on nothing but the order of the fields."""
    layout = Path(decoder.__file__).with_name("layout.cuh").read_text(encoding="utf-8")
    names = re.search(r"enum Field {(.*?)}", layout, re.DOTALL)[1].lower().split(",")
    assert [name.strip().removesuffix("_projection") for name in names] == [
        *LayerTensors._fields,
        "fields",
    ]


def test_the_kernel_has_the_same_arguments():
    path = Path(decoder.__file__).with_name("layout.cuh")
    fields = path.read_text(encoding="utf-8").split("struct Arguments {")[1].split("};")[0]
    names = re.findall(r"(\w+)[,;]", re.sub(r"//.*", "", fields))
    assert names == [name for name, _ in decoder.Arguments._fields_]


@COMPILER
def test_what_does_not_compile_is_said():
    with pytest.raises(RuntimeError, match="decoder.cu does not compile with .*LAYERS"):
        nvrtc.compile_code(decoder.SOURCE, "sm_90a", LAYERS=1)


@GPU
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        # Heads that do not divide a warp's columns; more layers, and an odd number of them.
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
    check(dtype, steps=5, **{**MODEL, **options})


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [WIDE, WIDER, WIDEST])
def test_widths_of_real_models(sizes, dtype):
    check(dtype, steps=5, **sizes)


@GPU
def test_two_runs_give_equal_bits():
    assert all(map(torch.equal, *two_runs(torch.bfloat16, **MODEL)))


@GPU
def test_many_steps_give_equal_bits():
    """A race between blocks would show in one of many steps."""
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
def test_a_captured_step():
    """A step in a CUDA graph stays with the tensors that it was captured with."""
    model, _ = build(torch.bfloat16, **MODEL)
    cache = MetaLACache(model.config)
    model(torch.zeros(1, 4, dtype=torch.long, device=DEVICE), past_key_values=cache)
    states = [(conv.to(torch.bfloat16), state) for conv, state in states_of(cache)]
    direct, captured = (make_token_decoder(model, copy.deepcopy(states)) for _ in range(2))
    token = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    logits = torch.empty(1, 1, model.config.vocab_size, dtype=torch.bfloat16, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step(token, logits)
    for next_token in torch.arange(5, device=DEVICE):
        token.fill_(next_token)
        graph.replay()
        assert torch.equal(logits[0, 0], logits_of(direct, model, next_token))


@GPU
def test_the_embedding_is_the_models_own():
    """A step scales and rounds the embedding as the model does: its bits are those of a step with
    the scaled embedding."""
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "K", "V"), [(8, 64, 128), (16, 32, 64)])
def test_steps_of_the_operators(dtype, heads, K, V):
    check_widths(dtype, 2e-2, heads, K, V, 2816)


def makes_no_decoder(change, dtype=torch.float32, **sizes) -> bool:
    model, _ = build(dtype, **{**SMALL, **sizes})
    change(model)
    cache = MetaLACache(model.config)
    model(torch.zeros(1, 1, dtype=torch.long, device=DEVICE), past_key_values=cache)
    states = [(conv.to(dtype), state) for conv, state in states_of(cache)]
    # In the order in which decoding asks.
    return (
        _unsupported_reason(model, model.device) is not None
        or make_token_decoder(model, states) is None
    )


@pytest.fixture
def any_sizes(monkeypatch):
    """Pretends that the kernel serves all sizes and devices."""
    monkeypatch.setattr(token_decoder, "choose", lambda *call, **sizes: "cuda")
    monkeypatch.setattr(decoder, "Decoder", lambda *arguments: arguments)


def test_layers_of_several_shapes(any_sizes):
    (one, other), *others = tensors_of(torch.float32, 2, 16, 16, 80)
    (wider,), *_ = tensors_of(torch.float32, 2, 32, 16, 80, layers=1)
    make = token_decoder.token_decoder
    layers, *rest = make([one, other], *others, **NUMBERS)
    assert [layer._asdict() for layer in layers] == [one, other]
    assert rest[:3] == others and rest[3:] == [3.0, 0.3, 0.5, 1e-6, 1e-5]
    assert make([one, wider], *others, **NUMBERS) is None
    assert make([one, {**other, "aug": None}], *others, **NUMBERS) is None


def test_tensors_that_no_kernel_takes(any_sizes):
    def bias_of_ones_own(model):
        model.lm_head.bias = torch.nn.Parameter(torch.ones(300, device=DEVICE))

    def transposed(model):
        weight = model.model.layers[0].channel_mixer.l1.weight
        weight.data = weight.data.T.contiguous().T

    def shifted(model):
        weight = model.lm_head.weight
        weight.data = torch.cat([weight.new_zeros(1), weight.data.flatten()])[1:].view_as(weight)

    def rows_for_more_tokens(model):
        weight = model.lm_head.weight
        weight.data = torch.cat([weight.data, weight.data[:4]])

    assert not makes_no_decoder(lambda model: None)
    assert makes_no_decoder(rows_for_more_tokens)
    assert makes_no_decoder(bias_of_ones_own)
    assert makes_no_decoder(transposed)
    assert makes_no_decoder(shifted)


@pytest.mark.parametrize(
    ("dtype", "change", "reason"),
    [
        (torch.float32, {}, "found float32, wanted bfloat16 or float16"),
        (torch.bfloat16, dict(K=128), "K = 128 and V = 128, wanted V = 2 K"),
        (torch.bfloat16, dict(D=512, H=1, K=256, V=512), "wanted .* K V ≤ 16384"),
    ],
)
def test_a_line_says_why_the_layers_serve(dtype, change, reason, monkeypatch, caplog):
    properties = SimpleNamespace(
        multi_processor_count=132, shared_memory_per_block_optin=GPU_NUMBERS["shared_bytes"]
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(decoder, "known_architectures", lambda: (90,))
    monkeypatch.setattr(backends, "_decided", {})
    backends.say.cache_clear()
    sizes = {**dict(D=1024, H=8, K=64, V=128, F=2816), **change}
    device = torch.device("cuda", 0)
    for _ in range(2):
        assert backends.choose("token_decoder", "auto", dtype, device, **sizes) == "layers"
    (record,) = caplog.records
    line = record.getMessage()
    assert re.search(f"token_decoder on cuda:0 by 'layers', for 'cuda' .*{reason}", line)


def test_on_the_cpu_the_layers_serve(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layers, *others = tensors_of(torch.bfloat16, 3, 8, 16, 80)
    arguments = [{name: x.cpu() for name, x in layer.items()} for layer in layers]
    others = [x.cpu() for x in others]
    assert token_decoder.token_decoder(arguments, *others, **NUMBERS) is None


@GPU
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        # Rows that are no whole vectors; fewer rows than multiprocessors.
        (torch.bfloat16, dict(decoder_embed_dim=36)),
        (torch.bfloat16, dict(glu_dim=80)),
        (torch.bfloat16, dict(expand_k=1.0)),  # K is not V / 2
    ],
)
def test_where_the_layers_serve(dtype, options):
    assert makes_no_decoder(lambda model: None, dtype, **{**MODEL, **options})


@GPU
def test_without_a_compiler_the_layers_serve(monkeypatch):
    monkeypatch.setattr(backends, "_decided", {})
    monkeypatch.setattr(decoder, "known_architectures", lambda: ())
    assert makes_no_decoder(lambda model: None, torch.bfloat16, **MODEL)
