"""Logits and gradients compared with an independent float64 computation, and model folders."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.parallel import scatter_gather
from transformers import AutoModelForCausalLM

from megatron_patch.hf import MetaLAForCausalLM, MetaLAModel
from tests.hf.conftest import HYBRID, KINDS


def expected_logits(
    state: dict[str, torch.Tensor], config, input_ids: torch.Tensor
) -> torch.Tensor:
    """Returns logits [B, T, vocab], computed token by token in float64 from the published formulas.

    This is the oracle: it shares no code with the model, only the names of the tensors.
    """
    state = {name: tensor.double() for name, tensor in state.items()}
    heads, dim = config.decoder_attention_heads, config.decoder_embed_dim
    key, value = int(config.expand_k * dim) // heads, dim // heads
    width = config.conv_width

    def norm(x, name):
        if config.norm_type == "layernorm":
            x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + config.norm_eps)
            return x * state[name] + state[name.replace("weight", "bias")]
        x = x / torch.sqrt((x * x).mean() + config.norm_eps)
        return x * state[name] if config.norm_type == "rmsnorm" else x

    def mlp(x, prefix):
        def linear(name, x):
            return state[prefix + name + ".weight"] @ x + state.get(prefix + name + ".bias", 0.0)

        gate = linear("l1", x)
        return linear("l3", gate * torch.sigmoid(gate) * linear("l2", x))

    def mixer(rows, prefix):
        get = lambda name: state[prefix + name]  # noqa: E731
        kernel = get("conv1d.weight")[:, 0]
        out, memory = [], torch.zeros(heads, key, value, dtype=torch.float64)
        for t in range(len(rows)):
            x = sum(
                kernel[:, width - 1 - back] * rows[t - back] for back in range(min(width, t + 1))
            )
            x = x * torch.sigmoid(x)
            q, a = ((get(n + ".weight") @ x).view(heads, key) for n in ("q_proj", "k_gate"))
            v = (get("v_proj.weight") @ x).view(heads, value)
            z = (get("g_proj.weight") @ x + get("g_proj.bias")).view(heads, value)
            decay = torch.sigmoid(a) ** (1 / config.tau)
            k = 1 - decay
            memory = decay[..., None] * memory + k[..., None] * v[:, None]
            y = torch.einsum("hk,hkv->hv", q, memory) / math.sqrt(key)
            if config.self_augmentation:
                weight = (q * get("aug_balance").view(heads, key) * k).sum(-1, keepdim=True)
                y = y + torch.sigmoid(weight * v)
            y = y - y.mean(-1, keepdim=True)
            y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + config.output_norm_eps)
            out.append(get("out_proj.weight") @ (z * torch.sigmoid(z) * y).flatten())
        return out

    def attention(rows, prefix):
        """Rotates by products of complex numbers, and takes the softmax of one query at a time."""

        def linear(name, x):
            return state[prefix + name + ".weight"] @ x + state.get(prefix + name + ".bias", 0.0)

        def rotate(x, t):
            if config.rope_theta is None:
                return x
            half = int(value * config.partial_rotary_factor) // 2
            angles = t * config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
            turn = torch.complex(torch.cos(angles), torch.sin(angles))
            turned = torch.complex(x[:, :half], x[:, half : 2 * half]) * turn
            return torch.cat([turned.real, turned.imag, x[:, 2 * half :]], dim=1)

        out, keys, values = [], [], []
        group = heads // config.num_key_value_heads
        for t, x in enumerate(rows):
            q = rotate(linear("q_proj", x).view(heads, value), t)
            keys.append(rotate(linear("k_proj", x).view(-1, value), t))
            values.append(linear("v_proj", x).view(-1, value))
            read = []
            for h in range(heads):
                scores = torch.stack([k[h // group] @ q[h] for k in keys]) / math.sqrt(value)
                weights = torch.exp(scores) / torch.exp(scores).sum()
                read.append(sum(w * v[h // group] for w, v in zip(weights, values, strict=True)))
            out.append(linear("out_proj", torch.cat(read)))
        return out

    logits = []
    for row in input_ids:
        scale = 1.0 if config.no_scale_embedding else math.sqrt(dim)
        rows = [state["model.embed_tokens.weight"][i] * scale for i in row]
        for layer in range(config.decoder_layers):
            prefix = f"model.layers.{layer}."
            token_mixer = attention if config.is_attention(layer) else mixer
            mixed = token_mixer(
                [norm(x, prefix + "token_norm.weight") for x in rows], prefix + "token_mixer."
            )
            rows = [x + y for x, y in zip(rows, mixed, strict=True)]
            rows = [
                x + mlp(norm(x, prefix + "channel_norm.weight"), prefix + "channel_mixer.")
                for x in rows
            ]
        rows = [norm(x, "model.final_norm.weight") for x in rows]
        logits.append(torch.stack([state["lm_head.weight"] @ x for x in rows]))
    return torch.stack(logits)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_type": "rmsnorm", "norm_eps": 1e-3},
        {"norm_type": "layernorm", "norm_eps": 1e-3, "expand_k": 1.0},
        {**HYBRID, "norm_type": "layernorm", "expand_k": 0.25},
        {"self_augmentation": False, "tau": 4.0, "conv_width": 3},
        {"bias": True, "no_scale_embedding": False, "conv_width": 1},
        {"decoder_attention_heads": 4, "output_norm_eps": 1e-2, "tie_word_embeddings": True},
        HYBRID,
        {"layer_types": ["linear_attention", "full_attention"], "norm_type": "rmsnorm"},
        {
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
            "decoder_layers": 3,
            "decoder_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_theta": 10000,
        },
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_forward_equals_the_formulas(tiny_model, tokens, changes):
    model = tiny_model(torch.float64, **changes)
    input_ids = tokens(2, 11)
    expected = expected_logits(model.state_dict(), model.config, input_ids)
    torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-10, atol=1e-10)
    single = model.float()(input_ids).logits
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_formulas(tiny_model, tokens, kind):
    model, input_ids = tiny_model(torch.float64, **KINDS[kind]).train(), tokens(2, 7)
    parameters = dict(model.named_parameters())

    def gradients(logits):
        loss = F.cross_entropy(logits.flatten(0, 1), input_ids.flatten())
        return torch.autograd.grad(loss, list(parameters.values()))

    expected = gradients(expected_logits(parameters, model.config, input_ids))
    for name, one, other in zip(
        parameters, gradients(model(input_ids).logits), expected, strict=True
    ):
        assert other.isfinite().all() and other.any(), name
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(tiny_model, tokens, dtype, kind):
    input_ids = tokens(2, 50)
    expected = tiny_model(**KINDS[kind])(input_ids).logits
    logits = tiny_model(dtype, **KINDS[kind])(input_ids).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(("norm_type", "bias"), [("simplermsnorm", False), ("rmsnorm", True)])
def test_tensor_names_and_shapes_are_the_authors(tiny_config, norm_type, bias):
    model = MetaLAForCausalLM(tiny_config(norm_type=norm_type, bias=bias))
    expected = {"model.embed_tokens.weight": [61, 32], "lm_head.weight": [61, 32]}
    for layer in ("model.layers.0.", "model.layers.1."):
        expected |= {
            layer + "token_mixer.q_proj.weight": [16, 32],
            layer + "token_mixer.k_gate.weight": [16, 32],
            layer + "token_mixer.v_proj.weight": [32, 32],
            layer + "token_mixer.g_proj.weight": [32, 32],
            layer + "token_mixer.g_proj.bias": [32],
            layer + "token_mixer.out_proj.weight": [32, 32],
            layer + "token_mixer.aug_balance": [16],
            layer + "token_mixer.conv1d.weight": [32, 1, 4],
            layer + "channel_mixer.l1.weight": [40, 32],
            layer + "channel_mixer.l2.weight": [40, 32],
            layer + "channel_mixer.l3.weight": [32, 40],
        }
        if bias:
            sizes = {"l1": 40, "l2": 40, "l3": 32}
            expected |= {
                f"{layer}channel_mixer.{name}.bias": [size] for name, size in sizes.items()
            }
        if norm_type == "rmsnorm":
            expected |= {layer + "token_norm.weight": [32], layer + "channel_norm.weight": [32]}
    if norm_type == "rmsnorm":
        expected["model.final_norm.weight"] = [32]
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_outputs_follow_transformers(tiny_model, tokens):
    model, input_ids = tiny_model(), tokens(2, 7)
    full = model(input_ids, output_hidden_states=True, labels=input_ids)
    assert len(full.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(full.hidden_states[0], model.model.embed_tokens(input_ids))
    torch.testing.assert_close(model.lm_head(full.hidden_states[-1]), full.logits)

    loss, logits, cache, _ = model(
        input_ids, output_hidden_states=True, labels=input_ids, return_dict=False
    )
    torch.testing.assert_close(loss, full.loss)
    torch.testing.assert_close(logits, full.logits)
    assert cache.get_seq_length() == 7
    assert len(model.model(input_ids, use_cache=False, return_dict=False)) == 1

    embeds = model.model.embed_tokens(input_ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, full.logits)
    for keep in ({"logits_to_keep": 3}, {"num_logits_to_keep": 3}):
        torch.testing.assert_close(model(input_ids, **keep).logits, full.logits[:, -3:])
    chosen = model(input_ids, logits_to_keep=torch.tensor([0, 4])).logits
    torch.testing.assert_close(chosen, full.logits[:, [0, 4]])
    each = model(input_ids, logits_to_keep=torch.tensor([[0, 4], [6, 1]])).logits
    torch.testing.assert_close(each, torch.stack([full.logits[0, [0, 4]], full.logits[1, [6, 1]]]))
    mask = tokens(2, 7) % 2 == 0
    masked = model(input_ids, logits_to_keep=mask).logits
    torch.testing.assert_close(masked, full.logits[mask])


def test_outputs_of_data_parallel_replicas_are_gathered(tiny_model, tokens, monkeypatch):
    """The Trainer evaluates so on several GPUs in one process."""
    gather = lambda device, dim, *x: torch.cat([y.reshape(-1, *y.shape[1:]) for y in x])  # noqa: E731
    monkeypatch.setattr(scatter_gather.Gather, "apply", gather)  # the original wants GPUs
    replica, ids = tiny_model()._replicate_for_data_parallel(), tokens(4, 7)
    whole = replica(ids, labels=ids)
    assert whole.past_key_values is not None
    replica.model = replica.model._replicate_for_data_parallel()
    found = scatter_gather.gather([replica(x, labels=x) for x in ids.split(2)], 0)
    torch.testing.assert_close(found.logits, whole.logits)
    assert found.loss.shape == (2,)


def test_wrong_inputs_are_refused(tiny_model, tokens):
    model, input_ids = tiny_model(), tokens(2, 7)
    with pytest.raises(ValueError, match="^input_ids, inputs_embeds: wanted exactly one"):
        model()
    with pytest.raises(ValueError, match="^input_ids, inputs_embeds: wanted exactly one"):
        model(input_ids, inputs_embeds=model.model.embed_tokens(input_ids))
    for kind in KINDS.values():
        with pytest.raises(ValueError, match="^input_ids: found no tokens"):
            tiny_model(**kind)(input_ids[:, :0])
    with pytest.raises(ValueError, match="^inputs_embeds: found no tokens"):
        model(inputs_embeds=model.model.embed_tokens(input_ids[:, :0]))


def test_initialisation_is_the_authors(tiny_config):
    config = tiny_config(
        decoder_embed_dim=256, decoder_layers=1, glu_dim=512, vocab_size=1000, bias=True
    )
    config.init_std = 0.05
    state = MetaLAForCausalLM(config).state_dict()
    mixer = "model.layers.0.token_mixer."
    for name in ("q_proj", "k_gate"):  # xavier-uniform with gain 2^-2.5 for [128, 256]
        bound = 2**-2.5 * math.sqrt(6 / (128 + 256))
        assert 0.98 * bound < state[f"{mixer}{name}.weight"].abs().max() <= bound
    for name in (mixer + "v_proj.weight", "model.embed_tokens.weight", "lm_head.weight"):
        assert abs(state[name].std().item() / 0.05 - 1) < 0.03, name
    assert abs(state["model.layers.0.channel_mixer.l3.weight"].std().item() / 0.05 - 1) < 0.03
    assert 0.45 < state[mixer + "conv1d.weight"].abs().max() <= 0.5  # 1 / sqrt(4)
    zeros = ("token_mixer.g_proj.bias", "token_mixer.aug_balance", "channel_mixer.l2.bias")
    assert not any(state["model.layers.0." + name].any() for name in zeros)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm_type", ["simplermsnorm", "rmsnorm"])
def test_save_and_load_keep_every_bit(tiny_model, tokens, tmp_path, tied, norm_type):
    model = tiny_model(tie_word_embeddings=tied, norm_type=norm_type)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is MetaLAForCausalLM
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    input_ids = tokens(1, 9)
    assert torch.equal(loaded.eval()(input_ids).logits, model(input_ids).logits)
    base = MetaLAModel.from_pretrained(tmp_path).eval()
    hidden = base(input_ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(input_ids).logits)


@pytest.mark.parametrize(
    ("dtype", "no_scale_embedding", "files"),
    [
        (torch.float16, False, "bin"),
        (torch.bfloat16, True, "sharded bin"),
        (torch.bfloat16, False, "safetensors"),
        (torch.float32, True, "safetensors"),
    ],
    ids=["fp16-bin", "bf16-bins", "bf16-safetensors", "fp32-safetensors"],
)
def test_a_folder_as_the_authors_release_it_loads(
    tiny_model, tokens, tmp_path, dtype, no_scale_embedding, files
):
    """The config.json has the authors' keys and those that transformers adds."""
    config = {
        "architectures": ["MetaLAForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_metala.MetaLAConfig",
            "AutoModelForCausalLM": "modeling_metala.MetaLAForCausalLM",
        },
        "model_type": "metala",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.35.0",
        "vocab_size": 61,
        "decoder_embed_dim": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "glu_dim": 40,
        "glu_act": "swish",
        "bias": False,
        "norm_type": "simplermsnorm",
        "no_scale_embedding": no_scale_embedding,
        "init_std": 0.02,
        "use_cache": True,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "add_bos_token": False,
        "causal": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {name: tensor.to(dtype) for name, tensor in tiny_model().state_dict().items()}
    if files == "safetensors":
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    elif files == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        places = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(state)}
        for file in set(places.values()):
            torch.save({n: t for n, t in state.items() if places[n] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {"total_size": 0}, "weight_map": places})
        )
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, torch_dtype="auto", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is MetaLAForCausalLM and not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, state[name]), name
    input_ids = tokens(1, 9)
    assert loaded(input_ids).logits.dtype == dtype
    expected = expected_logits(state, loaded.config, input_ids)
    torch.testing.assert_close(loaded.double()(input_ids).logits, expected, rtol=1e-10, atol=1e-10)


def test_a_missing_tensor_is_initialised_and_the_others_are_kept(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    state = {
        n: t for n, t in model.state_dict().items() if n != "model.layers.1.token_mixer.g_proj.bias"
    }
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = MetaLAForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"model.layers.1.token_mixer.g_proj.bias"}
    result = loaded.state_dict()
    assert not result["model.layers.1.token_mixer.g_proj.bias"].any()
    kept = [name for name in state if "layers.1.token_mixer.aug_balance" not in name]
    assert all(torch.equal(result[name], state[name]) for name in kept)


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(tiny_model, tokens, tied):
    model = tiny_model(tie_word_embeddings=tied)
    before = model(tokens(1, 5)).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70 and model.lm_head.weight.shape == (70, 32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    after = model(tokens(1, 5), labels=tokens(1, 5))
    torch.testing.assert_close(after.logits[..., :61], before)
    assert after.loss.isfinite()


def test_import_needs_no_engine_and_no_kernel_library():
    code = (
        "import sys, transformers.modeling_utils, transformers.generation; "
        "before = set(sys.modules); import megatron_patch.hf; "
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "heavy = loaded & {'pydantic', 'triton', 'fla', 'causal_conv1d', 'megatron', 'deepspeed'}; "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_are_read_inside_their_own_modules(tiny_model, tokens):
    """Offloading and ZeRO-3 provide a weight only while its module's forward runs."""
    accelerate = pytest.importorskip("accelerate")
    model, input_ids = tiny_model(norm_type="rmsnorm", bias=True), tokens(2, 7)
    expected = model(input_ids).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    output = model(input_ids[:, :4])
    rest = model(input_ids[:, 4:], past_key_values=output.past_key_values).logits
    torch.testing.assert_close(torch.cat([output.logits, rest], 1), expected, rtol=1e-3, atol=1e-4)


def test_short_convolution_equals_conv1d_and_silu(tiny_model):
    convolution = tiny_model().model.layers[0].token_mixer.conv1d
    x = torch.randn(2, 6, 32)
    padded = F.pad(x.transpose(1, 2), (3, 0))
    expected = F.silu(F.conv1d(padded, convolution.weight, groups=32)).transpose(1, 2)
    torch.testing.assert_close(convolution(x)[0], expected)
