"""Decoding by a captured step or a fused kernel equals decoding without, whatever happens to the
cache and the model.

The CPU has no CUDA graphs: there a "captured" step runs again on the same tensors, and all else is
as on a GPU. With a GPU, every test runs there too, with real graphs.
"""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GenerationConfig

from megatron_patch.hf import MetaLACache, decoding_metala, layers_metala, modeling_metala
from tests.hf.conftest import HYBRID, NO_END, same

TORCH_COMPILE = torch.compile
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return request.param


@pytest.fixture
def captured(device, monkeypatch):
    """A list of the steps that were captured."""
    made = []
    capture = decoding_metala.capture_cuda_graph if device == "cuda" else lambda step: step

    def count(step):
        replay = capture(step)
        made.append(replay)
        return replay

    monkeypatch.setattr(decoding_metala, "capture_cuda_graph", count)
    monkeypatch.setattr(decoding_metala, "_captured_steps", weakref.WeakKeyDictionary())
    if device == "cpu":
        monkeypatch.setattr(decoding_metala, "_can_capture_on", lambda device: True)
        monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    return made


@pytest.fixture
def model(tiny_model, device):
    return tiny_model(torch.float64).to(device)


@pytest.fixture
def kernels(model, monkeypatch):
    """A list of the fused kernels that were made. The model's own layers stand in for them."""
    made = []

    class Kernel:
        def __init__(self, layers, embedding, final_norm, head, *, embedding_scale, **numbers):
            self.states = [(layer["convolution_state"], layer["state"]) for layer in layers]
            self.embedding, self.head, self.embedding_scale = embedding, head, embedding_scale
            made.append(self)

        def step(self, token, logits):
            assert token.dtype == torch.long and token.device == self.head.device
            hidden = self.embedding_scale * self.embedding[token]
            for layer, states in zip(model.model.layers, self.states, strict=True):
                hidden = layer.forward(hidden, *states, None, None, None, True, True)[0]
            logits.copy_(model.model.final_norm(hidden) @ self.head.T)

    monkeypatch.setattr(decoding_metala, "token_decoder", Kernel)
    return made


@pytest.fixture
def check(model, captured, device, tokens):
    """A function that feeds one token to a cache, and to a copy without graph, which must agree.
    It returns whether the step was a captured one."""

    def check(cache, seed=0) -> bool:
        plain, before = copy.deepcopy(cache), len(captured)
        plain.decoding_graph = None
        ids = tokens(cache.batch_size, 1, seed=seed).to(device)
        with torch.no_grad():
            expected = model(ids, past_key_values=plain)
            with _PlainPath() as plain_path:
                output = model(ids, past_key_values=cache)
        same(output.logits, expected.logits)
        assert output.past_key_values is cache
        assert cache.get_seq_length() == plain.get_seq_length()
        for layer, other in zip(cache.layers, plain.layers, strict=True):
            for (_, tensor), (_, wanted) in zip(layer.tensors(), other.tensors(), strict=True):
                same(tensor, wanted)
        assert plain_path.calls == 0 or len(captured) == before
        return plain_path.calls == 0

    return check


class _PlainPath:
    """Counts the layers that the plain path runs, without touching the model or its classes."""

    def __init__(self):
        self.calls = 0

    def __enter__(self):
        self.function = function = modeling_metala.may_overwrite

        def count(*states):
            self.calls += 1
            return function(*states)

        modeling_metala.may_overwrite = count
        return self

    def __exit__(self, *_):
        modeling_metala.may_overwrite = self.function


@pytest.fixture
def prompt(model, tokens, device):
    """A function that returns a cache that has read a prompt."""

    @torch.no_grad()
    def prompt(batch=2, seed=0, decoding_graph="eager"):
        cache = MetaLACache(model.config, decoding_graph=decoding_graph)
        model(tokens(batch, 6, seed=seed).to(device), past_key_values=cache)
        return cache

    return prompt


STRATEGIES = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, num_return_sequences=3),
    "beams": dict(do_sample=False, num_beams=4, num_return_sequences=2),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_generate(model, captured, tokens, device, strategy):
    ids = tokens(2, 7).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0

    def run(**how):
        torch.manual_seed(3)
        settings = {**STRATEGIES[strategy], **NO_END, **how}
        return model.generate(ids, attention_mask=mask, max_new_tokens=9, **settings)

    expected = run()
    assert not captured
    for _ in range(2):
        out = run(past_key_values=MetaLACache(model.config, decoding_graph="eager"))
        assert torch.equal(out, expected)
    assert len(captured) == 1  # for both calls and all reorderings of beams


def test_cache_implementation_static(model, captured, tokens, device, monkeypatch):
    kinds = []
    monkeypatch.setattr(
        modeling_metala, "replay_step", lambda model, ids, cache: kinds.append(cache.decoding_graph)
    )
    ids = tokens(2, 7).to(device)
    how = dict(max_new_tokens=3, do_sample=False, **NO_END)
    expected = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, cache_implementation="static", **how), expected)
    if hasattr(GenerationConfig(), "disable_compile"):
        more = dict(cache_implementation="static", disable_compile=True)
        assert torch.equal(model.generate(ids, **more, **how), expected)
        assert kinds == ["compiled"] * 2 + ["eager"] * 2
    else:
        assert kinds == ["compiled"] * 2


def test_states_stay_in_place(prompt, check):
    cache = prompt()
    assert check(cache)
    held = [tensor for layer in cache.layers for _, tensor in layer.tensors()]
    for seed in range(3):
        assert check(cache, seed)
    now = [tensor for layer in cache.layers for _, tensor in layer.tensors()]
    assert all(one is other for one, other in zip(held, now, strict=True))


def test_several_caches_take_turns(prompt, check, captured):
    caches = [prompt(seed=seed) for seed in range(3)]
    for seed in range(3):
        for cache in caches:
            assert check(cache, seed)
    assert len(captured) == 1
    one, other, _ = caches
    shared = {t.data_ptr() for layer in one.layers for _, t in layer.tensors()}
    assert not shared & {t.data_ptr() for layer in other.layers for _, t in layer.tensors()}


def test_a_detached_cache_keeps_its_states(prompt, check):
    one, other = prompt(), prompt(seed=1)
    assert check(one)
    one.detach_()
    kept = copy.deepcopy(one)
    assert check(other, 1)
    for layer, wanted in zip(one.layers, kept.layers, strict=True):
        assert torch.equal(layer.recurrent_states, wanted.recurrent_states)
        assert torch.equal(layer.conv_states, wanted.conv_states)


def test_whatever_happens_to_a_cache(model, prompt, check, captured, tokens, device, tmp_path):
    cache = prompt()
    assert check(cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert check(cache)
    fork = copy.deepcopy(cache)
    assert check(cache, 1) and check(fork, 2) and check(cache, 3)
    with torch.no_grad():
        model(tokens(2, 5).to(device), past_key_values=cache)  # several tokens
    assert check(cache)
    cache.save(tmp_path / "state.safetensors")
    loaded = MetaLACache.load(tmp_path / "state.safetensors", device=device)
    assert not check(loaded)  # it asks for no graph
    loaded.decoding_graph = "eager"
    assert check(loaded)
    assert len(captured) == 1
    cache.batch_select_indices(torch.tensor([1]))
    assert check(cache) and len(captured) == 2  # another batch size
    cache.reset()
    with torch.no_grad():  # a first token has no state to continue
        output = model(tokens(1, 1).to(device), past_key_values=cache)
    torch.testing.assert_close(output.logits, model(tokens(1, 1).to(device)).logits)


def test_padding_before_is_remembered(model, captured, tokens, device):
    """A later call compares its mask of all tokens with it."""
    ids = tokens(2, 9).to(device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits[:, -2:]
        cache = MetaLACache(model.config, decoding_graph="eager")
        model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        model(ids[:, 6:7], past_key_values=cache)
        found = model(ids[:, 7:], attention_mask=mask, past_key_values=cache).logits
    assert len(captured) == 1
    same(found, wanted)


def test_changed_weights(model, prompt, check, captured):
    cache = prompt()
    assert check(cache)
    with torch.no_grad():
        model.model.layers[1].token_mixer.out_proj.weight.mul_(1.5)
    assert check(cache) and len(captured) == 1  # in place, so the graph sees the new values
    layer = model.model.layers[0].channel_mixer.l3
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    assert check(cache) and len(captured) == 2
    layer.weight.data = layer.weight.data * 0.5
    assert check(cache) and len(captured) == 3
    model.set_output_embeddings(copy.deepcopy(model.lm_head))
    assert check(cache) and len(captured) == 4


def test_adapters_are_not_bypassed(model, prompt, check, captured):
    peft = pytest.importorskip("peft")
    cache = prompt()
    assert check(cache)
    config = peft.LoraConfig(target_modules=["q_proj", "out_proj", "l1"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert not check(cache)  # the plain path runs the adapters
    with adapted.disable_adapter():
        assert not check(cache)
    adapted.merge_and_unload()
    assert check(cache) and len(captured) == 2


def test_hooks_are_called(model, prompt, check):
    cache = prompt()
    assert check(cache)
    hook = model.model.layers[0].token_mixer.v_proj.register_forward_hook(lambda m, i, o: 2 * o)
    assert not check(cache)
    hook.remove()
    assert check(cache)
    projection = model.model.layers[0].token_mixer.v_proj
    forward = projection.forward
    projection.forward = lambda x: 3 * forward(x)  # accelerate wraps modules so
    assert not check(cache)


PATCHED = [
    "MetaLAChannelMixer.forward",
    "MetaLATokenMixer.forward",
    "MetaLATokenMixer._heads",
    "MetaLARMSNorm.forward",
    "MetaLAShortConvolution.forward",
    "MetaLADecoderLayer.forward",
    "MetaLADecoderLayer.__call__",
    "MetaLAModel.embed",
    "MetaLAModel.forward",
    "nn.Linear.forward",
    "nn.Embedding.forward",
    "nn.Module.__call__",
    "meta_linear_attention",
    "short_convolution",
    "swiglu",
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", PATCHED)
def test_patched_code_is_not_bypassed(
    model, prompt, check, captured, kernels, monkeypatch, name, batch
):
    """Liger and others patch classes and functions so, before a capture or after it."""
    said = []
    monkeypatch.setattr(decoding_metala.logger, "warning_once", said.append)
    cache = prompt(batch, decoding_graph="compiled" if batch == 1 else "eager")
    assert check(cache)
    *path, attribute = name.split(".")
    owner = layers_metala if hasattr(layers_metala, name.split(".")[0]) else modeling_metala
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, attribute)

    def patched(*args, **kwargs):
        outputs = function(*args, **kwargs)
        if isinstance(outputs, torch.Tensor) and outputs.is_floating_point():
            return 1.5 * outputs
        if isinstance(outputs, tuple) and torch.is_tensor(outputs[0]):
            return (1.5 * outputs[0], *outputs[1:])
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, patched)
        assert not check(cache)
        assert f"found {name.removeprefix('nn.')} replaced" in said[-1]
        assert not check(prompt(3))
    assert check(cache)


def test_foreign_weights_and_classes_are_not_bypassed(model, prompt, check, kernels):
    cache = prompt(1, decoding_graph="compiled")
    assert check(cache)
    mixer = model.model.layers[1].token_mixer
    mixer.gain = torch.nn.Parameter(torch.ones(1, dtype=torch.float64, device=model.device))
    assert not check(cache)
    del mixer.gain
    assert check(cache)
    mixer.register_buffer("gain", torch.ones(1, device=model.device))
    assert not check(cache)
    del mixer.gain
    bias = torch.randn_like(mixer.q_proj.weight[:, 0])
    mixer.q_proj.bias = torch.nn.Parameter(bias)
    assert not check(cache)
    mixer.q_proj.bias = None
    assert check(cache)

    class Loud(type(mixer)):
        def forward(self, *args):
            out, *states = super().forward(*args)
            return 2 * out, *states

    kind, mixer.__class__ = mixer.__class__, Loud
    assert not check(cache)
    mixer.__class__ = kind
    assert check(cache)


def test_hooks_on_all_modules_are_called(model, prompt, check):
    cache = prompt()
    assert check(cache)
    register = torch.nn.modules.module.register_module_forward_hook
    hook = register(lambda m, i, o: 2 * o if isinstance(m, torch.nn.Linear) else o)
    try:
        assert not check(cache)
    finally:
        hook.remove()
    assert check(cache)


@pytest.mark.parametrize("batch", [1, 2])
def test_changed_numbers_lead_to_a_new_capture(model, prompt, check, captured, kernels, batch):
    cache = prompt(batch, decoding_graph="compiled" if batch == 1 else "eager")
    layer = model.model.layers[0]
    changes = [
        (layer.token_mixer, "tau", 3.0),
        (layer.token_mixer, "scale", 0.7),
        (layer.token_mixer, "norm_eps", 0.1),
        (layer.channel_norm, "eps", 0.2),
        (model.model.final_norm, "eps", 0.3),
        (model.model, "embed_scale", 1.7),
    ]
    assert check(cache)
    for count, (module, name, value) in enumerate(changes, 2):
        setattr(module, name, value)
        assert check(cache)
        assert len(kernels) + len(captured) == count


def test_the_kernel_needs_equal_numbers_in_all_layers(model, prompt, monkeypatch):
    made = []
    monkeypatch.setattr(decoding_metala, "token_decoder", lambda *args, **kwargs: made.append(args))
    cache = prompt(1)
    states = [cache.states(layer) for layer in range(len(cache))]
    decoding_metala.make_token_decoder(model, states)
    assert len(made) == 1
    model.model.layers[0].token_mixer.tau = 3.0
    assert decoding_metala.make_token_decoder(model, states) is None
    model.model.layers[0].token_mixer.tau = model.model.layers[1].token_mixer.tau
    model.model.layers[1].channel_norm.eps = 0.5
    assert decoding_metala.make_token_decoder(model, states) is None and len(made) == 1


def test_layer_norms_have_no_kernel_but_a_graph(tiny_model, monkeypatch, captured, tokens, device):
    made = []
    monkeypatch.setattr(decoding_metala, "token_decoder", lambda *args, **kwargs: made.append(args))
    model = tiny_model(torch.float64, norm_type="layernorm").to(device)
    graphed, plain = MetaLACache(model.config, decoding_graph="eager"), MetaLACache(model.config)
    with torch.no_grad():
        for cache in (graphed, plain):
            model(tokens(1, 5).to(device), past_key_values=cache)
        ids = tokens(1, 1).to(device)
        found, wanted = (model(ids, past_key_values=c).logits for c in (graphed, plain))
    same(found, wanted)
    assert len(captured) == 1 and not made


def test_the_dtype_of_the_model_decides(model, prompt, captured, tokens, device):
    cache = prompt()
    model.float()
    cache.layers[0].conv_states = cache.layers[0].conv_states.double()
    for layer in cache.layers:
        layer.recurrent_states = layer.recurrent_states.float()
    plain = copy.deepcopy(cache)
    plain.decoding_graph = None
    with torch.no_grad():
        for seed in range(2):
            ids = tokens(2, 1, seed=seed).to(device)
            found, wanted = (model(ids, past_key_values=c).logits for c in (cache, plain))
            assert torch.equal(found, wanted)
    assert len(captured) == 1


def test_calls_that_are_not_replayed(model, prompt, captured, tokens, device):
    ids = tokens(2, 1).to(device)
    with torch.no_grad():
        for how in (
            dict(attention_mask=torch.tensor([[1], [0]], device=device)),
            dict(labels=ids),
            dict(use_cache=False),
            dict(output_hidden_states=True),
        ):
            cache = prompt()
            plain = copy.deepcopy(cache)
            plain.decoding_graph = None
            found = model(ids, past_key_values=cache, **how)
            wanted = model(ids, past_key_values=plain, **how)
            assert torch.equal(found.logits, wanted.logits)
            assert found.keys() == wanted.keys()
    assert model(ids, past_key_values=prompt()).logits.requires_grad
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        model.float()(ids, past_key_values=MetaLACache(model.config, decoding_graph="eager"))
    assert not captured


def test_hybrids_take_the_plain_path(tiny_model, captured, tokens, device, monkeypatch):
    """A captured step could not let keys and values grow."""
    said = []
    monkeypatch.setattr(decoding_metala.logger, "warning_once", said.append)
    model = tiny_model(torch.float64, **HYBRID).to(device)
    ids = tokens(2, 9).to(device)
    with torch.no_grad():
        wanted = model(ids).logits[:, 6:]
        cache = MetaLACache(model.config, decoding_graph="eager")
        model(ids[:, :6], past_key_values=cache)
        found = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(6, 9)]
    same(torch.cat(found, 1), wanted)
    assert cache.get_seq_length() == 9 and not captured
    assert said and all("attention layers" in text for text in said)


def test_outputs_as_a_tuple(model, prompt, captured, tokens, device):
    with torch.no_grad():
        cache = prompt()
        logits, returned = model(tokens(2, 1).to(device), past_key_values=cache, return_dict=False)
    assert len(captured) == 1 and returned is cache and logits.shape == (2, 1, 61)


def test_inference_mode_inside_and_outside(model, prompt, tokens, device, captured):
    """States made under `inference_mode` cannot be written outside of it; others can inside it."""
    for kind in (None, "eager"):
        with torch.inference_mode():
            cache = prompt(decoding_graph=kind)
        logits = []
        for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
            with mode():
                logits.append(model(tokens(2, 1).to(device), past_key_values=cache).logits)
        if kind is None:
            expected = logits
    for one, other in zip(logits, expected, strict=True):
        same(one, other)
    assert len(captured) == 1


def test_threads_take_turns(model, captured, tokens, device):
    prompts = [tokens(1, 6, seed=seed).to(device) for seed in range(3)]
    how = dict(max_new_tokens=12, do_sample=False, **NO_END)
    expected = [model.generate(ids, **how) for ids in prompts]

    def run(ids):
        cache = MetaLACache(model.config, decoding_graph="eager")
        return model.generate(ids, past_key_values=cache, **how)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, prompts))
    assert all(map(torch.equal, found, expected)) and len(captured) == 1


def test_a_step_within_another_threads_call(model, prompt, check, tokens, device, monkeypatch):
    """Another cache takes the tensors of the captured step from the cache that is being read."""
    one, other = prompt(), prompt(seed=1)
    assert check(one)
    caches = [copy.deepcopy(cache) for cache in (one, other)]
    for cache in caches:
        cache.decoding_graph = None
    ids, step = tokens(2, 5, seed=2).to(device), tokens(2, 1, seed=3).to(device)
    expected = [
        model(x, past_key_values=c).logits for x, c in zip((ids, step), caches, strict=True)
    ]
    may_overwrite, found = modeling_metala.may_overwrite, []

    @torch.no_grad()
    def read(ids, cache):
        found.append(model(ids, past_key_values=cache).logits)

    def step_first(*states):  # called while a layer's states are in use
        if not found:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(read, step, other).result()
        return may_overwrite(*states)

    monkeypatch.setattr(modeling_metala, "may_overwrite", step_first)
    read(ids, one)
    for logits, wanted in zip(found, reversed(expected), strict=True):
        same(logits, wanted)
    assert check(one) and check(other)


def test_the_number_of_captured_steps_is_limited(model, prompt, check, captured):
    for batch in range(1, 8):
        assert check(prompt(batch))
    kept = decoding_metala._captured_steps[model]
    assert len(kept) == decoding_metala.MAX_CAPTURED_STEPS
    made = len(captured)
    assert check(prompt(7)) and len(captured) == made
    assert check(prompt(1)) and len(captured) == made + 1


def test_layers_compile_once(model, prompt, check, captured, device, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def compile_(function, dynamic, options):
        assert options == decoding_metala.COMPILE_OPTIONS
        return TORCH_COMPILE(function, dynamic=dynamic, backend=backend, fullgraph=True)

    if device == "cpu":
        monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    cache = prompt(decoding_graph="compiled")
    for seed in range(3):
        assert check(cache, seed)
    assert len(captured) == 1
    assert len(compiled) == (1 if device == "cpu" else 0)


def test_a_kernel_needs_no_graph(model, prompt, check, captured, kernels):
    model.model.embed_scale = 2.5
    one, other = prompt(1, decoding_graph="compiled"), prompt(1, 1, decoding_graph="compiled")
    for seed in range(3):
        assert check(one, seed) and check(other, seed)
    assert len(kernels) == 1 and not captured
    assert check(prompt(2, decoding_graph="eager")) and check(prompt(1)) and len(captured) == 2
    assert len(kernels) == 1


def test_a_kernel_returns_new_logits_each_time(model, prompt, kernels, captured, tokens, device):
    """Some ids have another dtype, which the kernel cannot read."""
    caches = [prompt(1, decoding_graph=kind) for kind in (None, "compiled")]
    with torch.no_grad():
        expected, found = (
            [
                model(tokens(1, 1, seed=seed).to(device, dtype), past_key_values=cache).logits
                for seed, dtype in enumerate((torch.int64, torch.int32, torch.int64))
            ]
            for cache in caches
        )
    assert len(kernels) == 1
    for logits, wanted in zip(found, expected, strict=True):
        same(logits, wanted)


def test_a_kernel_of_a_changed_model(model, prompt, check, captured, kernels):
    cache, embedding = prompt(1, decoding_graph="compiled"), model.model.embed_tokens
    assert check(cache) and len(kernels) == 1
    with torch.no_grad():
        embedding.weight.mul_(1.5)
    assert check(cache) and len(kernels) == 1
    embedding.weight.data = embedding.weight.data * 0.5
    assert check(cache) and len(kernels) == 2
    model.lm_head.weight = embedding.weight
    assert check(cache) and len(kernels) == 3
    hook = embedding.register_forward_hook(lambda m, i, o: 2 * o)
    assert not check(cache)
    hook.remove()
    assert check(cache) and len(kernels) == 4 and not captured


def test_a_look_up_that_changes_the_weights(model, prompt, kernels):
    model.model.embed_tokens.max_norm = 1.0
    cache = prompt(1)
    states = [cache.states(layer) for layer in range(len(cache))]
    assert decoding_metala.make_token_decoder(model, states) is None and not kernels


@GPU
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu(tiny_model, tokens, batch, dtype):
    """The kernels of real models: eager steps equal the plain path bit by bit, compiled ones are as
    close to float64 as the plain path."""
    sizes = dict(decoder_embed_dim=256, glu_dim=384, decoder_layers=3)
    model, oracle = (tiny_model(d, **sizes).cuda() for d in (dtype, torch.float64))
    ids, steps = tokens(batch, 300).cuda(), tokens(batch, 4, seed=1).cuda()

    @torch.no_grad()
    def logits(model, kind):
        cache = MetaLACache(model.config, decoding_graph=kind)
        model(ids, past_key_values=cache)
        rows = [model(step, past_key_values=cache).logits for step in steps.split(1, dim=1)]
        return torch.cat(rows, dim=1).double()

    plain, wanted = logits(model, None), logits(oracle, None)
    assert torch.equal(logits(model, "eager"), plain)
    error = (plain - wanted).norm()
    assert (logits(model, "compiled") - wanted).norm() < 1.5 * error + 1e-6 * wanted.norm()


def test_a_model_is_not_kept_alive(tiny_model, tokens, captured, device):
    model = tiny_model().to(device)
    cache = MetaLACache(model.config, decoding_graph="eager")
    ids = tokens(1, 5).to(device)
    model.generate(ids, max_new_tokens=3, past_key_values=cache, **NO_END)
    assert len(captured) == 1
    gone = weakref.ref(model)
    del model
    captured.clear()
    gc.collect()
    assert gone() is None


def test_wrong_names_of_graphs_are_refused(tiny_config):
    with pytest.raises(
        ValueError, match="^decoding_graph: found True, wanted one of None, 'eager'"
    ):
        MetaLACache(tiny_config(), decoding_graph=True)
