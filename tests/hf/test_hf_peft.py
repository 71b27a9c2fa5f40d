"""LoRA on the projections, compared in float64 with a model whose weights are W + scaling B A."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")

PROJECTIONS = ["q_proj", "k_gate", "v_proj", "g_proj", "out_proj", "l1", "l2", "l3"]
RANK, ALPHA = 2, 6
SCALING = ALPHA / RANK


def adapted(model, targets):
    """Returns a copy of the model with random adapters; new ones would be zero."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def adapters(model) -> dict[str, dict[str, torch.nn.Parameter]]:
    """Maps the name of a weight in the model without adapters to its A and B."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            found.setdefault(f"{layer}.weight", {})[rest[0]] = parameter
    return found


@pytest.fixture
def base(tiny_model):
    return tiny_model(torch.float64)


@pytest.fixture
def written_out(base):
    """A function that returns a model without adapters equal to the given one with adapters."""

    def build(model):
        plain = copy.deepcopy(base)
        with torch.no_grad():
            for name, pair in adapters(model).items():
                plain.get_parameter(name).add_(SCALING * pair["B"] @ pair["A"])
        return plain

    return build


@pytest.mark.parametrize("target", PROJECTIONS)
def test_an_adapter_on_one_projection(base, written_out, tokens, target):
    """The adapter has an effect, and the gradients that follow from the weight's gradient."""
    model, input_ids = adapted(base, [target]), tokens(2, 9)
    plain = written_out(model)
    assert len(adapters(model)) == 2
    one = model(input_ids, labels=input_ids)
    other = plain(input_ids, labels=input_ids)
    torch.testing.assert_close(one.logits, other.logits)
    assert not torch.allclose(one.logits, base(input_ids).logits, atol=1e-3)
    one.loss.backward()
    other.loss.backward()
    for name, pair in adapters(model).items():
        gradient = SCALING * plain.get_parameter(name).grad
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(pair["A"].grad, pair["B"].T @ gradient, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(pair["B"].grad, gradient @ pair["A"].T, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_a_frozen_base(base, tokens, reentrant):
    model, input_ids = adapted(base, "all-linear").train(), tokens(2, 9)
    assert len(adapters(model)) == 2 * len(PROJECTIONS)  # not the head
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    model(input_ids, labels=input_ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # transformers 5 does so by itself
    model(input_ids, labels=input_ids).loss.backward()
    for name, gradient in expected.items():
        assert gradient.any()
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_generating_merging_and_saving(base, written_out, tokens, tmp_path):
    """Decoding token by token, also after loading the adapters from a file."""
    model, prompt = adapted(base, PROJECTIONS).eval(), tokens(2, 5)
    expected = written_out(model)
    how = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    how |= dict(return_dict_in_generate=True, output_logits=True)

    def check(model):
        found, wanted = (m.generate(input_ids=prompt, **how) for m in (model, expected))
        assert torch.equal(found.sequences, wanted.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits))

    check(model)
    model.save_pretrained(tmp_path)
    check(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
    with model.disable_adapter():
        torch.testing.assert_close(model(prompt).logits, base(prompt).logits)
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name))
    check(merged)


@pytest.mark.parametrize("rank", [2, 32])
def test_the_convolution_takes_no_adapter(base, rank):
    """PEFT's adapter for `nn.Conv1d` knows neither its inputs nor its state."""
    with pytest.raises(ValueError, match="Target module MetaLAShortConvolution.* is not supported"):
        config = peft.LoraConfig(r=rank, target_modules=["conv1d"], task_type="CAUSAL_LM")
        peft.get_peft_model(copy.deepcopy(base), config)


def test_the_convolution_can_be_trained_in_full(base, tokens):
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["conv1d"], task_type="CAUSAL_LM"
    )
    model, input_ids = peft.get_peft_model(copy.deepcopy(base), config), tokens(2, 9)
    torch.testing.assert_close(model(input_ids).logits, base(input_ids).logits)
    model(input_ids, labels=input_ids).loss.backward()
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "conv1d" in n]
    assert len(trained) == 2 and all(p.grad.any() for p in trained)
