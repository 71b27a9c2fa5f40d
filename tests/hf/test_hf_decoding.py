"""Decoding by a recorded step or a kernel: as without, whatever happens to cache and model.

On the CPU, where CUDA graphs do not exist, a "recording" runs the same step on the same tensors
anew; all else is what runs on a GPU. With a GPU, every test runs there too, with real graphs.
"""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GenerationConfig

from megatron_patch.hf import MetaLACache, decoding_metala, layers_metala, modeling_metala
from tests.hf.conftest import HYBRID

NO_END = dict(eos_token_id=None, pad_token_id=0)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return request.param


@pytest.fixture
def recorded(device, monkeypatch):
    """The list of what has been recorded."""
    made = []
    record = decoding_metala.capture_cuda_graph if device == "cuda" else lambda step: step

    def count(step):
        replay = record(step)
        made.append(replay)
        return replay

    monkeypatch.setattr(decoding_metala, "capture_cuda_graph", count)
    monkeypatch.setattr(decoding_metala, "_captured_steps", weakref.WeakKeyDictionary())
    if device == "cpu":
        monkeypatch.setattr(decoding_metala, "_can_capture_on", lambda device: True)
    return made


@pytest.fixture
def model(tiny_model, device):
    return tiny_model(torch.float64).to(device)


@pytest.fixture
def kernels(model, monkeypatch):
    """The list of the kernels that have been made; the model's own layers stand in for them."""
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
def check(model, recorded, device, tokens):
    """Function: feeds one token to a cache, and to a copy of it without graph; they must agree.
    Returns whether the step came from a recording."""

    def check(cache, seed=0) -> bool:
        plain, before = copy.deepcopy(cache), len(recorded)
        plain.decoding_graph = None
        ids = tokens(cache.batch_size, 1, seed=seed).to(device)
        with torch.no_grad():
            expected = model(ids, past_key_values=plain)
            with _PlainPath() as plain_path:
                output = model(ids, past_key_values=cache)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-9, atol=1e-9)
        assert output.past_key_values is cache
        assert cache.get_seq_length() == plain.get_seq_length()
        for layer, other in zip(cache.layers, plain.layers, strict=True):
            for (_, tensor), (_, wanted) in zip(layer.tensors(), other.tensors(), strict=True):
                torch.testing.assert_close(tensor, wanted, rtol=1e-9, atol=1e-9)
        assert plain_path.calls == 0 or len(recorded) == before
        return plain_path.calls == 0

    return check


class _PlainPath:
    """Counts the layers that run by themselves, without touching the model or its classes."""

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
    """Function: a cache that has read a prompt."""

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
def test_generate(model, recorded, tokens, device, strategy):
    ids = tokens(2, 7).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0

    def run(**how):
        torch.manual_seed(3)
        settings = {**STRATEGIES[strategy], **NO_END, **how}
        return model.generate(ids, attention_mask=mask, max_new_tokens=9, **settings)

    expected = run()
    assert not recorded
    for _ in range(2):
        out = run(past_key_values=MetaLACache(model.config, decoding_graph="eager"))
        assert torch.equal(out, expected)
    assert len(recorded) == 1  # for both calls, and all reorderings of beams


def test_the_switch_of_generate(model, recorded, tokens, device, monkeypatch):
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


def test_several_caches_take_turns(prompt, check, recorded):
    caches = [prompt(seed=seed) for seed in range(3)]
    for seed in range(3):
        for cache in caches:
            assert check(cache, seed)
    assert len(recorded) == 1
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


def test_whatever_happens_to_a_cache(model, prompt, check, recorded, tokens, device, tmp_path):
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
    assert not check(loaded)  # which was not asked to replay
    loaded.decoding_graph = "eager"
    assert check(loaded)
    assert len(recorded) == 1
    cache.batch_select_indices(torch.tensor([1]))
    assert check(cache) and len(recorded) == 2  # another batch size
    cache.reset()
    with torch.no_grad():  # a first token has no state to continue
        output = model(tokens(1, 1).to(device), past_key_values=cache)
    torch.testing.assert_close(output.logits, model(tokens(1, 1).to(device)).logits)


def test_padding_before_is_remembered(model, recorded, tokens, device):
    """A later call's mask of all tokens is compared with it."""
    ids = tokens(2, 9).to(device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits[:, -2:]
        cache = MetaLACache(model.config, decoding_graph="eager")
        model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        model(ids[:, 6:7], past_key_values=cache)
        found = model(ids[:, 7:], attention_mask=mask, past_key_values=cache).logits
    assert len(recorded) == 1
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_changed_weights(model, prompt, check, recorded):
    cache = prompt()
    assert check(cache)
    with torch.no_grad():
        model.model.layers[1].token_mixer.out_proj.weight.mul_(1.5)
    assert check(cache) and len(recorded) == 1  # in place: the graph reads what is there
    layer = model.model.layers[0].channel_mixer.l3
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    assert check(cache) and len(recorded) == 2
    layer.weight.data = layer.weight.data * 0.5
    assert check(cache) and len(recorded) == 3
    model.set_output_embeddings(copy.deepcopy(model.lm_head))
    assert check(cache) and len(recorded) == 4


def test_adapters_are_not_bypassed(model, prompt, check, recorded):
    peft = pytest.importorskip("peft")
    cache = prompt()
    assert check(cache)
    config = peft.LoraConfig(target_modules=["q_proj", "out_proj", "l1"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert not check(cache)  # the step that a copy without graph takes, adapters and all
    with adapted.disable_adapter():
        assert not check(cache)
    adapted.merge_and_unload()
    assert check(cache) and len(recorded) == 2


def test_hooks_are_called(model, prompt, check):
    cache = prompt()
    assert check(cache)
    hook = model.model.layers[0].token_mixer.v_proj.register_forward_hook(lambda m, i, o: 2 * o)
    assert not check(cache)
    hook.remove()
    assert check(cache)
    projection = model.model.layers[0].token_mixer.v_proj
    forward = projection.forward
    projection.forward = lambda x: 3 * forward(x)  # as accelerate wraps modules
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
    model, prompt, check, recorded, kernels, monkeypatch, name, batch
):
    """As Liger and others patch classes and functions: before a recording, and after one."""
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
def test_changed_numbers_are_recorded_anew(model, prompt, check, recorded, kernels, batch):
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
        assert len(kernels) + len(recorded) == count


def test_a_kernel_of_one_tau_is_not_given_two(model, prompt, monkeypatch):
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


def test_layer_norms_have_no_kernel_but_a_recording(
    tiny_model, monkeypatch, recorded, tokens, device
):
    made = []
    monkeypatch.setattr(decoding_metala, "token_decoder", lambda *args, **kwargs: made.append(args))
    model = tiny_model(torch.float64, norm_type="layernorm").to(device)
    recording, plain = MetaLACache(model.config, decoding_graph="eager"), MetaLACache(model.config)
    with torch.no_grad():
        for cache in (recording, plain):
            model(tokens(1, 5).to(device), past_key_values=cache)
        ids = tokens(1, 1).to(device)
        found, wanted = (model(ids, past_key_values=c).logits for c in (recording, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert len(recorded) == 1 and not made


def test_another_dtype(model, prompt, recorded, tokens, device):
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
    assert len(recorded) == 1


def test_what_is_not_replayed(model, prompt, recorded, tokens, device):
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
    assert not recorded


def test_hybrids_take_the_plain_path(tiny_model, recorded, tokens, device, monkeypatch):
    """A recording would keep the prompt's keys and values; its tensors would not grow."""
    said = []
    monkeypatch.setattr(decoding_metala.logger, "warning_once", said.append)
    model = tiny_model(torch.float64, **HYBRID).to(device)
    ids = tokens(2, 9).to(device)
    with torch.no_grad():
        wanted = model(ids).logits[:, 6:]
        cache = MetaLACache(model.config, decoding_graph="eager")
        model(ids[:, :6], past_key_values=cache)
        found = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(6, 9)]
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == 9 and not recorded
    assert said and all("attention layers" in text for text in said)


def test_as_a_tuple(model, prompt, recorded, tokens, device):
    with torch.no_grad():
        cache = prompt()
        logits, returned = model(tokens(2, 1).to(device), past_key_values=cache, return_dict=False)
    assert len(recorded) == 1 and returned is cache and logits.shape == (2, 1, 61)


def test_inference_mode_inside_and_outside(model, prompt, tokens, device, recorded):
    """States made under `inference_mode` cannot be written outside of it, and the other way round
    they can."""
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
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert len(recorded) == 1


def test_threads_take_turns(model, recorded, tokens, device):
    prompts = [tokens(1, 6, seed=seed).to(device) for seed in range(3)]
    how = dict(max_new_tokens=12, do_sample=False, **NO_END)
    expected = [model.generate(ids, **how) for ids in prompts]

    def run(ids):
        cache = MetaLACache(model.config, decoding_graph="eager")
        return model.generate(ids, past_key_values=cache, **how)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, prompts))
    assert all(map(torch.equal, found, expected)) and len(recorded) == 1


def test_a_step_within_another_threads_call(model, prompt, check, tokens, device, monkeypatch):
    """Of another cache, which takes the recorded step's tensors from the one that is being read."""
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

    def step_first(*states):  # with a layer's states at hand
        if not found:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(read, step, other).result()
        return may_overwrite(*states)

    monkeypatch.setattr(modeling_metala, "may_overwrite", step_first)
    read(ids, one)
    for logits, wanted in zip(found, reversed(expected), strict=True):
        torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
    assert check(one) and check(other)


def test_no_more_captured_steps_than_few(model, prompt, check, recorded):
    for batch in range(1, 8):
        assert check(prompt(batch))
    kept = decoding_metala._captured_steps[model]
    assert len(kept) == decoding_metala.MAX_CAPTURED_STEPS
    made = len(recorded)
    assert check(prompt(7)) and len(recorded) == made
    assert check(prompt(1)) and len(recorded) == made + 1


def test_layers_compile_once(model, prompt, check, recorded, device, monkeypatch):
    compiled = []
    torch_compile = torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def compile_(function, dynamic, options):
        assert options == decoding_metala.COMPILE_OPTIONS
        return torch_compile(function, dynamic=dynamic, backend=backend, fullgraph=True)

    if device == "cpu":
        monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    cache = prompt(decoding_graph="compiled")
    for seed in range(3):
        assert check(cache, seed)
    assert len(recorded) == 1
    assert len(compiled) == (1 if device == "cpu" else 0)


def test_a_kernel_needs_no_graph(model, prompt, check, recorded, kernels):
    model.model.embed_scale = 2.5
    one, other = prompt(1, decoding_graph="compiled"), prompt(1, 1, decoding_graph="compiled")
    for seed in range(3):
        assert check(one, seed) and check(other, seed)
    assert len(kernels) == 1 and not recorded
    assert check(prompt(2, decoding_graph="eager")) and check(prompt(1)) and len(recorded) == 2
    assert len(kernels) == 1


def test_a_kernels_logits_are_the_callers(model, prompt, kernels, recorded, tokens, device):
    """Also of ids that it cannot read where they are."""
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
        torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)


def test_a_kernel_of_a_changed_model(model, prompt, check, recorded, kernels):
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
    assert check(cache) and len(kernels) == 4 and not recorded


def test_a_look_up_that_changes_the_weights(model, prompt, kernels):
    model.model.embed_tokens.max_norm = 1.0
    cache = prompt(1)
    states = [cache.states(layer) for layer in range(len(cache))]
    assert decoding_metala.make_token_decoder(model, states) is None and not kernels


@GPU
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu(tiny_model, tokens, batch, dtype):
    """Of the kernels that real models run: eager bit by bit, compiled as near to float64 as the
    plain path is."""
    sizes = dict(decoder_embed_dim=256, glu_dim=384, decoder_layers=3)
    model, exact = (tiny_model(d, **sizes).cuda() for d in (dtype, torch.float64))
    ids, steps = tokens(batch, 300).cuda(), tokens(batch, 4, seed=1).cuda()

    @torch.no_grad()
    def logits(model, kind):
        cache = MetaLACache(model.config, decoding_graph=kind)
        model(ids, past_key_values=cache)
        rows = [model(step, past_key_values=cache).logits for step in steps.split(1, dim=1)]
        return torch.cat(rows, dim=1).double()

    plain, wanted = logits(model, None), logits(exact, None)
    assert torch.equal(logits(model, "eager"), plain)
    error = (plain - wanted).norm()
    assert (logits(model, "compiled") - wanted).norm() < 1.5 * error + 1e-6 * wanted.norm()


def test_a_model_is_not_kept_alive(tiny_model, tokens, recorded, device):
    model = tiny_model().to(device)
    cache = MetaLACache(model.config, decoding_graph="eager")
    ids = tokens(1, 5).to(device)
    model.generate(ids, max_new_tokens=3, past_key_values=cache, **NO_END)
    assert len(recorded) == 1
    gone = weakref.ref(model)
    del model
    recorded.clear()
    gc.collect()
    assert gone() is None


def test_wrong_names(tiny_config):
    with pytest.raises(
        ValueError, match="^decoding_graph: found True, wanted one of None, 'eager'"
    ):
        MetaLACache(tiny_config(), decoding_graph=True)
