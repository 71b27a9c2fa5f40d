"""The layer inside GPT-NeoX: its parameters and their marks, its mathematics, recomputation,
FLOPs."""

from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_parameters_and_their_marks(in_neox, config):
    """Shapes; what gradient clipping counts on every rank; what weight decay skips: the output
    gate's bias, the self-augmentation's per-channel scale, and (not here) norm weights."""
    code = """
    from megatron.model.utils import get_params_for_weight_decay_optimization as groups
    from megatron.training import get_model
    model = get_model(neox_args)
    layer = model.sequential[2]
    names = {id(p): n for n, p in layer.named_parameters()}
    undecayed = [names[id(p)] for p in groups(model, neox_args)[1]["params"] if id(p) in names]
    split = [n for n, p in layer.named_parameters() if getattr(p, "model_parallel", False)]
    shapes = {n: list(p.shape) for n, p in layer.named_parameters()}
    answer([shapes, sorted(undecayed), sorted(split)])
    """
    shapes, undecayed, split = in_neox(config, code)
    assert shapes == {
        "mixer.out_gate_bias": [4, 16],
        "mixer.aug_balance": [4, 8],
        "mixer.conv1d.weight": [64, 1, 4],
        "mixer.in_proj.weight": [192, 64],
        "mixer.out_proj.weight": [64, 64],
        "mlp.gate_up_proj.weight": [192, 64],
        "mlp.down_proj.weight": [64, 96],
    }
    assert undecayed == ["mixer.aug_balance", "mixer.out_gate_bias"]
    assert split == sorted(set(shapes) - {"mixer.conv1d.weight"})


@pytest.mark.parametrize("expand_k", [0.5, 1.0])
def test_output_is_the_recurrence(in_neox, config, expand_k):
    """One layer in float64 against the formulas of its parts, written out token by token."""
    config["metala"] = {**(config.get("metala") or {}), "expand_k": expand_k}
    code = """
    from megatron.training import get_model
    import torch.nn.functional as F
    layer = get_model(neox_args).sequential[2].double()
    torch.manual_seed(0)
    for p in (layer.mixer.aug_balance, layer.mixer.out_gate_bias):
        torch.nn.init.normal_(p)
    m, d, H = layer.mixer, 64, 4
    V, T, B = 16, 9, 2
    K = int(neox_args.metala["expand_k"] * V)
    x = torch.randn(T, B, d, dtype=torch.float64)
    norm = lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    h = norm(x)
    expected = torch.empty_like(x)
    S = torch.zeros(B, H, K, V, dtype=torch.float64)
    W = m.in_proj.weight.view(H, 2 * K + 2 * V, d)
    for t in range(T):
        c = sum(m.conv1d.weight[:, 0, 3 - j] * h[t - j] for j in range(4) if t - j >= 0)
        c = c * torch.sigmoid(c)
        q, a, v, z = torch.einsum("hcd,bd->bhc", W, c).split([K, K, V, V], -1)
        z = z + m.out_gate_bias
        decay = torch.sigmoid(a) ** (1 / 16)
        k = 1 - decay
        S = decay[..., None] * S + k[..., None] * v[..., None, :]
        y = torch.einsum("bhk,bhkv->bhv", q, S) * K ** -0.5
        y = y + torch.sigmoid((q * m.aug_balance * k).sum(-1, keepdim=True) * v)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        expected[t] = (z * torch.sigmoid(z) * y).reshape(B, d) @ m.out_proj.weight.T
    x1 = x + expected
    w1, w3 = layer.mlp.gate_up_proj.weight.chunk(2)
    h = norm(x1)
    expected = x1 + (F.silu(h @ w1.T) * (h @ w3.T)) @ layer.mlp.down_proj.weight.T
    answer((layer((x, None))[0] - expected).abs().max().item())
    """
    assert in_neox(config, code) < 1e-12


def test_a_transposed_gradient_is_copied_once(in_neox, config):
    """GPT-NeoX transposes what its last layer gives. Below it, products and sums get gradients as
    one block of memory."""
    code = """
    from megatron.training import get_model
    model = get_model(neox_args)
    found = []
    look = lambda module, d_inputs, d_outputs: found.append(d_outputs[0].is_contiguous())
    for layer in model.sequential[2:4]:
        layer.mlp.register_full_backward_hook(look)
    x = torch.randn(5, 3, 64, requires_grad=True)
    for layer in model.sequential[2:4]:
        x = layer((x, None))[0]
    x.transpose(0, 1).contiguous().square().sum().backward()
    answer(found)
    """
    assert in_neox(config, code) == [True, True]


def test_cached_steps_continue_the_sequence(in_neox, config):
    code = """
    from megatron.training import get_model
    layer = get_model(neox_args).sequential[2].double()
    x = torch.randn(11, 2, 64, dtype=torch.float64)
    run = lambda x: layer((x, None))[0]
    whole = run(x)
    layer.use_cache = True
    parts = torch.cat([run(x[:5]), run(x[5:6]), run(x[6:7]), run(x[7:])])
    answer((whole - parts).abs().max().item())
    """
    assert in_neox(config, code) < 1e-12


def test_without_the_cache_no_state_of_a_generation_is_left(in_neox, config):
    """`eval_tasks` do so during training: they generate with the cache, and training goes on."""
    code = """
    from megatron.training import get_model
    model = get_model(neox_args)
    layer = model.sequential[2]
    x = torch.randn(11, 1, 64)
    run = lambda: layer((x, None))[0]
    expected = run()
    model.inference_mode(use_cache=True)
    run()
    model.train_mode()
    answer([(run() - expected).abs().max().item() for _ in range(2)])
    """
    assert in_neox(config, code) == [0, 0]


@pytest.mark.parametrize("layers", [["metala", "metala"], ["metala", "global"]])
def test_a_prompt_is_continued_alike_whatever_was_generated_before(in_neox, config, layers):
    code = """
    from functools import partial
    from types import SimpleNamespace
    from megatron.text_generation_utils import generate_samples_from_prompt
    from megatron.training import get_batch_sequential, get_model
    neox_args.return_logits = True
    model = get_model(neox_args, use_cache=True)
    model.set_batch_fn(partial(get_batch_sequential, neox_args=neox_args))
    model.inference_mode(use_cache=True)
    engine = SimpleNamespace(module=model, eval=model.eval)
    def first_logits(*prompts):  # of one token: GPT-NeoX has no room for the logits of more
        samples = generate_samples_from_prompt(neox_args, engine, [*prompts], maximum_tokens=8)
        return torch.tensor(samples[-1]["logits"][0])
    difference = first_logits("a") - first_logits("b", "a")
    left = [layer.layer_past is None for layer in model.sequential[2:4]]
    answer([difference.abs().max().item(), left])
    """
    config["attention_config"] = layers
    assert in_neox(config, code) == [0, [True, True]]


@pytest.mark.parametrize("pipe_parallel_size", [0, 1])
def test_layers_are_recomputed(in_neox, config, pipe_parallel_size):
    """With activation checkpointing each layer runs twice in a step, which changes no weight."""
    code = """
    from megatron.training import setup_model_and_optimizer, train_step
    from megatron.utils import Timers
    from megatron_patch.neox.layer import ParallelMetaLALayerPipe
    calls = 0
    forward = ParallelMetaLALayerPipe.forward
    def counted(self, args):
        global calls
        calls += 1
        return forward(self, args)
    ParallelMetaLALayerPipe.forward = counted
    model, optimizer, lr_scheduler, _ = setup_model_and_optimizer(neox_args)
    batches = iter([{"text": torch.arange(65).repeat(4, 1)}])
    timers = Timers(use_wandb=False, tensorboard_writer=None, comet_experiment=None)
    train_step(neox_args, timers, batches, model, optimizer, lr_scheduler)
    answer([calls, [p.double().sum().item() for p in model.module.parameters()]])
    """
    config.update(pipe_parallel_size=pipe_parallel_size)
    calls, weights = in_neox(config, code)
    assert calls == 2
    calls, recomputed = in_neox({**config, "checkpoint_activations": True}, code)
    assert calls == 4
    assert recomputed == weights


def on_cpu(file: Path, config: dict) -> dict:
    """The settings of a configuration file, changed as little as a CPU needs."""
    keys = ("distributed_backend", "tokenizer_type", "vocab_file")
    cpu = {key: config[key] for key in keys}
    return {**yaml.safe_load(file.read_text()), **cpu, "precision": "fp32", "data_types": None}


@pytest.mark.parametrize(
    ("name", "parameters", "batch"),
    [
        ("380m", 373_952_512, 256 * 2048),
        ("1b", 1_364_467_712, 1024 * 2048),
        ("3b", 2_914_922_496, 1024 * 2048),
    ],
)
def test_sizes_of_the_configurations(in_neox, config, name, parameters, batch):
    """Parameters of the model that GPT-NeoX builds, on the meta device, with 32,000 tokens; tokens
    of a batch on one GPU and on 32. The former is also what the file's first line tells."""
    code = """
    from deepspeed.pipe import LayerSpec
    from megatron.model import GPT2ModelPipe
    from megatron.model.init_functions import get_init_methods
    neox_args.padded_vocab_size = 32000
    torch.cuda.current_device = lambda: torch.device("meta")
    model = GPT2ModelPipe.__new__(GPT2ModelPipe)  # only its specs are needed
    torch.nn.Module.__init__(model)
    model.neox_args, model.use_cache, model.parallel_output = neox_args, False, True
    model.hidden_size, model.num_tokentypes = neox_args.hidden_size, 0
    model.init_method, model.output_layer_init_method = get_init_methods(neox_args)
    model.init_specs()
    layers = [spec.build() for spec in model.specs if isinstance(spec, LayerSpec)]
    def batch(gpus):
        args = NeoXArgs.from_dict({**settings, "global_num_gpus": gpus})
        sequences = args.train_micro_batch_size_per_gpu * args.gradient_accumulation_steps * gpus
        return sequences * args.seq_length
    answer([sum(p.numel() for layer in layers for p in layer.parameters()), batch(1), batch(32)])
    """
    file = CONFIGS / f"metala_{name}.yml"
    if name == "380m":
        assert (CONFIGS / "metala.yml").read_text() == file.read_text()
    found = in_neox(on_cpu(file, config), code)
    assert found == [parameters, batch, batch]
    assert f"{parameters:,} parameters" in file.read_text()


def test_the_command_of_the_readme_finds_its_settings(in_neox, config):
    """`-d configs metala.yml local_setup.yml` with GPT-NeoX's own local_setup.yml and with ours."""
    code = """
    sizes = []
    for local in ("configs/local_setup.yml", %r):
        cpu = {"distributed_backend": "gloo", "precision": "fp32", "data_types": None}
        args = NeoXArgs.from_ymls(["configs/metala.yml", local], overwrite_values=cpu)
        sizes.append([args.hidden_size, args.attention_config.count("metala"), args.save])
    answer(sizes)
    """
    code %= str(CONFIGS / "local_setup.yml")
    assert in_neox(config, code) == [[1024, 24, "checkpoints"]] * 2


@pytest.mark.parametrize(
    ("layers", "key_width"), [(["metala", "metala"], 16), (["metala", "global"], 8)]
)
def test_printed_flops_match_the_formula(in_neox, config, layers, key_width):
    """Against an independent count: matrix shapes of the built model, the recurrence, and attention
    to all of a sequence's tokens, with half the key heads and an MLP of another width."""
    code = """
    from megatron.logging import get_actual_flops, get_forward_backward_flops
    from megatron.training import get_model
    model = get_model(neox_args)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1
                   and "word_embeddings" not in n and "aug" not in n and "bias" not in n)
    answer([matrices, get_actual_flops(neox_args, 2.0), get_forward_backward_flops(neox_args, 2.0)])
    """
    config.update(attention_config=layers, checkpoint_activations=True)
    config["metala"] = {**(config.get("metala") or {}), "expand_k": key_width / 16}
    if "global" in layers:
        config.update(num_kv_heads=2, mlp_multiple_of=20)
    matrices, actual, needed = in_neox(config, code)
    heads, value_width, hidden_size, length = 4, 16, 64, 64
    recurrence = heads * 5 * key_width * value_width
    attention = 2 * 2 * length * hidden_size
    forward = 2 * matrices + sum(recurrence if x == "metala" else attention for x in layers)
    tokens = 4 * length
    assert actual == pytest.approx(4 * tokens * forward / 2.0)
    assert needed == pytest.approx(3 * tokens * forward / 2.0)


def test_each_model_of_a_process_has_its_own_attention_mask(in_neox, config):
    """Whichever was built last: attention is causal, MetaLA layers alone carry no s x s mask."""
    code = """
    import copy
    from megatron import text_generation_utils, training
    torch.manual_seed(0)
    hybrid_args = copy.copy(neox_args)
    hybrid_args.attention_config = ["global", "metala"]
    both = (neox_args, hybrid_args)
    found = []
    for order in (both, both[::-1]):
        models = {id(args): training.get_model(args).eval() for args in order}
        for args in both:
            tokens = torch.randint(0, 512, (2, 9))
            other = torch.cat([tokens[:, :5], torch.randint(0, 512, (2, 4))], 1)
            with torch.no_grad():
                shapes, logits = [], []
                for ids in (tokens, other):
                    inputs = training.get_batch_sequential((ids, ids), args)
                    logits.append(models[id(args)](inputs)[:, :5])
                    shapes.append(list(inputs[2].shape[2:]))
            shapes.append(list(text_generation_utils.get_batch(args, tokens)[1].shape[2:]))
            batch = training._get_batch(args, None, ["text"], {"text": tokens}, torch.int64)
            shapes.append(list(batch[3].shape[2:]))
            found.append([shapes, torch.equal(*logits)])
    answer(found)
    """
    unread, read = [[[1, 1]] * 4, True], [[[9, 9]] * 3 + [[8, 8]], True]
    assert in_neox(config, code) == [unread, read] * 2


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_model_without_a_pipeline_is_in_memory_once(in_neox, config, is_tied):
    """GPT-NeoX makes it from a pipeline, whose layers it builds anew. The pipeline's go at once."""
    code = """
    import gc
    from megatron.training import get_model
    gc.collect()
    gc.disable()
    model = get_model(neox_args)
    alive = [x for x in gc.get_objects() if isinstance(x, torch.nn.Parameter)]
    answer([len(alive), len(list(model.parameters()))])
    """
    alive, parameters = in_neox(config | {"no_weight_tying": not is_tied}, code)
    assert alive == parameters == 2 * 7 + 2 - is_tied


@pytest.mark.parametrize("expand_k", [0.5, 1.0])
def test_authors_initialisation(in_neox, config, expand_k):
    """Linears normal(0.02); q and gate logits Xavier-uniform with gain 2**-2.5 over their matrix,
    [expand_k d, d]. It is the default."""
    config["metala"] = {"expand_k": expand_k}
    code = """
    from megatron.training import get_model
    mixer = get_model(neox_args).sequential[2].mixer
    by_head = mixer.in_proj.weight.view(16, -1, 1024)  # q K, gate K, v 64, out gate 64
    uniform, normal = by_head[:, :-128], by_head[:, -128:]
    out = mixer.out_proj.weight
    answer([uniform.abs().max().item(), uniform.std().item(), normal.std().item(), out.std().item(),
            mixer.aug_balance.abs().max().item(), mixer.out_gate_bias.abs().max().item()])
    """
    config.update(hidden_size=1024, num_attention_heads=16, intermediate_size=256, num_layers=1)
    config.update(attention_config=["metala"])
    largest, uniform, normal, out, aug, bias = in_neox(config, code)
    bound = 2**-2.5 * (6 / (1024 + 1024 * expand_k)) ** 0.5
    assert largest == pytest.approx(bound, rel=1e-3) and largest <= bound
    assert uniform == pytest.approx(bound / 3**0.5, rel=0.01)
    assert normal == pytest.approx(0.02, rel=0.01) and out == pytest.approx(0.02, rel=0.01)
    assert aug == bias == 0
