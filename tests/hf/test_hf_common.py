"""The tests that transformers runs on each of its own causal models, unless other files of this
folder have them already.

transformers has them in `ModelTesterMixin`, `GenerationTesterMixin` and `ConfigTester` of its own
test suite, which its wheel leaves out; these are their equivalents. The source distribution has
`test_modeling_common.py`, `test_configuration_common.py` and `test_training_mixin.py`. Those of
5.23.0 were run against MetaLAModel and MetaLAForCausalLM on the CPU: 80 tests passed, none failed,
and the tests of these features skipped themselves:

- attention: outputs, implementations and kernels (SDPA, FlashAttention, flex), sliding windows;
- rotary and other position embeddings, experts, encoder-decoder and composite models;
- plans for tensor parallelism, modules kept in float32, renamed checkpoint keys, captured outputs,
  of which the model has none;
- one GPU or several: offloading, static caches and loading under a device, model parallelism,
  embeddings resized under DeepSpeed, compiled training. Offloading, sharding and compilation are
  tested here on the CPU.

`GenerationTesterMixin` lies in a subfolder that the source distribution leaves out, and was not
run. `test_hf_generate.py` tests that assisted and contrastive generation are refused.
"""

import copy
import inspect
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM

from megatron_patch.hf import MetaLAConfig, MetaLAForCausalLM, MetaLAModel
from tests.hf.conftest import KINDS


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A model and its folder, with the weights in several files."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    return model, tmp_path / "model"


def test_signature(tiny_config):
    model = MetaLAForCausalLM(tiny_config())
    assert model.can_generate() and model.main_input_name == "input_ids"
    for part in (model, model.model):
        assert list(inspect.signature(part.forward).parameters)[:2] == [
            "input_ids",
            "attention_mask",
        ]


def test_calls_are_deterministic(tiny_model, tokens):
    model, ids = tiny_model().train(), tokens(2, 9)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_found_and_replaced(tiny_model, tokens, tied):
    model, ids = tiny_model(tie_word_embeddings=tied), tokens(1, 5)
    assert model.get_input_embeddings() is model.model.get_input_embeddings()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    expected = model(ids).logits
    replacement = torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight.detach())
    model.set_input_embeddings(replacement)
    assert model.model.embed_tokens is replacement
    torch.testing.assert_close(model(ids).logits, expected)
    head = torch.nn.Linear(32, 61, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head


def test_resizing_to_a_multiple(tiny_model, tokens):
    model, ids = tiny_model(), tokens(1, 5)
    with torch.no_grad():
        expected = model(ids).logits
    model.resize_token_embeddings(70, pad_to_multiple_of=16)
    assert model.config.vocab_size == model.lm_head.out_features == 80
    torch.testing.assert_close(model(ids).logits[..., :61], expected)
    ids[0, -1] = 79
    model(ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 1]])},
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2]])},
    ],
    ids=["plain", "padded", "packed"],
)
def test_gradients_of_hidden_states(tiny_model, tokens, how):
    model, ids = tiny_model(), tokens(2, 5)
    out = model(ids, output_hidden_states=True, use_cache=False, **how)
    for hidden in out.hidden_states:
        hidden.retain_grad()
    out.logits.exp().sum().backward()
    assert all(hidden.grad.abs().amax(-1).all() for hidden in out.hidden_states[-1:])
    assert all(hidden.grad.abs().max() > 0 for hidden in out.hidden_states)


def test_inputs_can_require_gradients(tiny_model, tokens):
    """Adapters on a frozen, checkpointed model need this."""
    model = tiny_model().requires_grad_(False).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert model.is_gradient_checkpointing
    assert model(tokens(1, 5)).logits.requires_grad


def test_base_model_and_causal_model_load_each_others_folders(saved, tokens, tmp_path):
    model, folder = saved
    ids = tokens(2, 6)
    expected = model.model(ids).last_hidden_state
    base = AutoModel.from_pretrained(folder)
    assert type(base) is MetaLAModel and torch.equal(base(ids).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    causal, info = MetaLAForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"} and not info["unexpected_keys"]
    assert torch.equal(causal.model(ids).last_hidden_state, expected)
    assert causal.lm_head.weight.std() > 0


def test_a_tensor_of_another_shape_is_refused_or_left_out(saved):
    model, folder = saved
    with pytest.raises((RuntimeError, ValueError), match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder, vocab_size=70)
    other = AutoModelForCausalLM.from_pretrained(
        folder, vocab_size=70, ignore_mismatched_sizes=True
    )
    assert other.lm_head.weight.shape == other.model.embed_tokens.weight.shape == (70, 32)
    layer = "model.layers.1.token_mixer.q_proj.weight"
    assert torch.equal(other.state_dict()[layer], model.state_dict()[layer])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_loaded_in_a_dtype(saved, tokens, dtype):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    torch.testing.assert_close(
        loaded(tokens(1, 5)).logits.float(), model(tokens(1, 5)).logits, atol=0.3, rtol=0
    )


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {"": "cpu"},
        {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.final_norm": "cpu",
            "lm_head": "disk",
        },
    ],
    ids=["auto", "cpu", "disk"],
)
def test_device_map(saved, tokens, tmp_path, device_map):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    if torch.cuda.is_available():
        pytest.skip("compared on the CPU")
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    how = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(loaded.generate(tokens(2, 6), **how), model.generate(tokens(2, 6), **how))


class OneDevice(TorchDispatchMode):
    """Fails if an operation mixes devices, as it would on GPUs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = {x.device for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.ndim}
        assert len(found) < 2 or func is torch.ops.aten._to_copy.default, (func, found)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_on_two_devices(tiny_model, tokens, kind):
    """accelerate spreads a model over GPUs: masks and states must follow to each block's device."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids = tiny_model(**KINDS[kind]), tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    for module in (model.model.layers[1], model.model.final_norm, model.lm_head):
        # "meta" computes shapes only, and is a second device on every machine.
        hook = hooks.AlignDevicesHook(torch.device("meta"), place_submodules=False)
        hooks.add_hook_to_module(module.to("meta"), hook)
    with torch.no_grad(), OneDevice():
        out = model(ids, attention_mask=mask, output_hidden_states=True)
        devices = [hidden.device.type for hidden in out.hidden_states]
        assert devices == ["cpu", "cpu", "meta"] and out.logits.device.type == "meta"
        cache = out.past_key_values
        out = model(ids, attention_mask=mask, past_key_values=cache)
        assert out.logits.shape == (2, 5, 61)
        for keep in (torch.tensor([0, 4]), torch.tensor([[0], [4]])):
            model(ids, logits_to_keep=keep)


@pytest.mark.parametrize("beams", [1, 3])
def test_outputs_of_generate(tiny_model, tokens, beams):
    model, ids = tiny_model(torch.float64), tokens(2, 6)
    out = model.generate(
        ids,
        max_new_tokens=4,
        num_beams=beams,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    rows = 2 * beams
    assert out.sequences.shape == (2, 10)
    assert [tuple(s.shape) for s in out.scores] == [(rows, 61)] * 4
    assert [tuple(s.shape) for s in out.logits] == [(rows, 61)] * 4
    widths = [6, 1, 1, 1]
    for step, width in zip(out.hidden_states, widths, strict=True):
        assert [tuple(h.shape) for h in step] == [(rows, width, 32)] * 3
    assert out.past_key_values.get_seq_length() == 9
    if beams == 1:
        steps = torch.stack(out.logits, 1)
        torch.testing.assert_close(steps, model(out.sequences[:, :-1]).logits[:, 5:].float())
    else:
        totals = model.compute_transition_scores(
            out.sequences, out.scores, out.beam_indices, normalize_logits=False
        ).sum(1)
        torch.testing.assert_close(totals / 4, out.sequences_scores, atol=1e-5, rtol=0)


def test_generate_without_a_prompt(tiny_model):
    model = tiny_model()
    out = model.generate(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out.shape == (1, 5) and out[0, 0] == model.config.bos_token_id


def test_generation_settings_are_kept(tiny_model, tmp_path):
    model = tiny_model()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    loaded = MetaLAForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.generation_config.eos_token_id == model.config.eos_token_id


def test_configuration_files(tiny_config, tmp_path):
    config = tiny_config(tau=8.0, norm_type="rmsnorm")
    config.to_json_file(tmp_path / "by-hand.json")
    config.save_pretrained(tmp_path)
    for again in (
        MetaLAConfig.from_json_file(tmp_path / "by-hand.json"),
        MetaLAConfig.from_pretrained(tmp_path),
        MetaLAConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        copy.deepcopy(config),
    ):
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert json.loads(MetaLAConfig().to_json_string())["model_type"] == "metala"
    assert MetaLAConfig(num_labels=3).num_labels == 3
