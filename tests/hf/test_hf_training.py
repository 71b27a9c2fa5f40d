"""Training: loss, cache, checkpointing, packed sequences, Trainer, autocast and compilation."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from megatron_patch.hf import MetaLACache, MetaLAForCausalLM
from tests.hf.conftest import HYBRID, KINDS

TRANSFORMERS_4 = transformers.__version__.startswith("4.")


@pytest.fixture(params=KINDS)
def model(tiny_model, request):
    return tiny_model(torch.float64, **KINDS[request.param]).train()


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def same(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_loss_is_the_shifted_cross_entropy(model, tokens):
    input_ids = tokens(2, 9)
    labels = input_ids.clone()
    labels[0, :4] = -100
    output = model(input_ids, labels=labels)
    scores, targets = output.logits[:, :-1].reshape(-1, 61).float(), labels[:, 1:].reshape(-1)
    same(output.loss.double(), F.cross_entropy(scores, targets).double())
    whole = model(input_ids, labels=labels, num_items_in_batch=40).loss
    same(whole, F.cross_entropy(scores, targets, reduction="sum") / 40)


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 has no shift_labels")
def test_labels_that_are_shifted_already(model, tokens):
    """Sequence-parallel trainers pass `shift_labels`."""
    input_ids = tokens(2, 9)
    shifted = F.pad(input_ids, (0, 1), value=-100)[:, 1:].contiguous()
    expected = model(input_ids, labels=input_ids).loss
    unread = torch.full_like(input_ids, 5)
    same(model(input_ids, labels=unread, shift_labels=shifted).loss, expected)


@pytest.mark.parametrize("use_cache", [None, False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_falls_with_and_without_the_cache(tiny_config, tokens, use_cache, checkpointing):
    model = MetaLAForCausalLM(tiny_config()).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    input_ids, losses = tokens(4, 24), []
    for _ in range(12):
        output = model(input_ids, labels=input_ids, use_cache=use_cache)
        assert (output.past_key_values is not None) is bool(use_cache)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_checkpointing_and_cache_do_not_change_gradients(
    model, tokens, use_cache, reentrant, padded
):
    input_ids = tokens(2, 9)
    mask = None
    if padded:
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, :3] = mask[1, 4:6] = 0
    how = dict(attention_mask=mask, labels=input_ids)
    expected = gradients(model, model(input_ids, use_cache=False, **how).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad()
    model(input_ids, use_cache=use_cache, **how).loss.backward()
    for name, parameter in model.named_parameters():
        same(parameter.grad, expected[name])


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 checkpoints all blocks or none")
def test_checkpointing_every_second_block(tiny_model, tokens):
    model, input_ids = tiny_model(decoder_layers=3).train(), tokens(1, 5)
    model.activation_checkpointing_enable(every_n_layers=2)
    runs = [0, 0, 0]
    for index, layer in enumerate(model.model.layers):
        layer.token_mixer.register_forward_hook(
            lambda *_, index=index: runs.__setitem__(index, runs[index] + 1)
        )
    model(input_ids, labels=input_ids).loss.backward()
    assert runs == [2, 1, 2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_through_the_cache(model, tokens, checkpointing):
    """Two calls joined by a cache have the gradients of one call; `detach_` cuts them."""
    input_ids = tokens(2, 9)
    expected = gradients(model, model(input_ids).logits[:, 5:].square().sum())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    cache = model(input_ids[:, :5], use_cache=True).past_key_values
    cut = copy.deepcopy(cache).detach_()
    second = model(input_ids[:, 5:], past_key_values=cache)
    for name, gradient in gradients(model, second.logits.square().sum()).items():
        same(gradient, expected[name])
    second = model(input_ids[:, 5:], past_key_values=cut)
    assert not torch.allclose(
        gradients(model, second.logits.square().sum())["model.embed_tokens.weight"],
        expected["model.embed_tokens.weight"],
    )


def packed_forms(lengths: list[int]) -> dict[str, dict]:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "cu_seqlens": dict(cu_seqlens=bounds),
        "int32": dict(cu_seqlens=bounds.int()),
        "cu_seq_lens_q": dict(cu_seq_lens_q=bounds.int()),
        "position_ids": dict(position_ids=positions),
        "with a mask of ones": dict(
            position_ids=positions, attention_mask=torch.ones_like(positions)
        ),
    }


@pytest.mark.parametrize("form", packed_forms([1]))
def test_packed_documents_do_not_see_each_other(model, tokens, form):
    lengths = [4, 1, 7, 2]
    input_ids = tokens(1, sum(lengths))
    output = model(input_ids, output_hidden_states=True, **packed_forms(lengths)[form])
    assert output.past_key_values is None
    alone = [model(piece).logits for piece in input_ids.split(lengths, dim=1)]
    same(output.logits, torch.cat(alone, dim=1))
    embeds = model.model.embed_tokens(input_ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **packed_forms(lengths)[form]).logits
    (gradient,) = torch.autograd.grad(logits[:, 5:12].sum(), embeds)
    assert not gradient[:, :5].any() and not gradient[:, 12:].any() and gradient[:, 5:12].any()


def test_packed_rows_with_padding(model, tokens):
    input_ids, positions = (
        tokens(2, 8),
        torch.tensor([[0, 0, 0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3, 1, 1]]),
    )
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    logits = model(input_ids, position_ids=positions, attention_mask=mask).logits
    for row, start, end in [(0, 2, 5), (0, 5, 8), (1, 0, 2), (1, 2, 6)]:
        same(logits[row : row + 1, start:end], model(input_ids[row : row + 1, start:end]).logits)


@pytest.mark.parametrize("rows", [1, 2])
def test_positions_that_do_not_restart_change_nothing(model, tokens, rows):
    input_ids = tokens(2, 8)
    positions = (torch.arange(8) + 5).expand(rows, -1)
    output = model.eval()(input_ids, position_ids=positions)
    same(output.logits, model(input_ids).logits)
    assert output.past_key_values is not None


def test_positions_beside_a_padding_mask_change_nothing(model, tokens):
    """The usual positions, counted from the mask with 1 at padding, are not read as packing."""
    input_ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = mask[1, 6:] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    output = model.eval()(input_ids, attention_mask=mask, position_ids=positions)
    same(output.logits, model(input_ids, attention_mask=mask).logits)
    assert output.past_key_values is not None


def test_calls_that_cannot_be_packed_are_refused(model, tokens):
    bounds = torch.tensor([0, 4, 8])
    with pytest.raises(ValueError, match="^cu_seqlens: found with batch 2"):
        model(tokens(2, 8), cu_seqlens=bounds)
    with pytest.raises(ValueError, match="^cu_seqlens: .*padding True"):
        model(tokens(1, 8), cu_seqlens=bounds, attention_mask=torch.tensor([[0] + [1] * 7]))
    with pytest.raises(ValueError, match="^use_cache, past_key_values: "):
        model(tokens(1, 8), cu_seqlens=bounds, use_cache=True)
    with pytest.raises(ValueError, match="^use_cache, past_key_values: "):
        model(tokens(1, 8), cu_seqlens=bounds, past_key_values=MetaLACache(model.config))
    with pytest.raises(ValueError, match=r"^position_ids: found \[1, 7\], wanted \[1, 8\]"):
        model(tokens(1, 8), position_ids=torch.arange(7)[None])


@pytest.mark.parametrize(
    "flash_arguments",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4.46 gives none")
        ),
    ],
)
def test_flattening_collator_trains_as_single_documents(model, tokens, flash_arguments):
    documents = [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in (5, 8, 3)]
    how = dict(return_flash_attn_kwargs=True, return_position_ids=False) if flash_arguments else {}
    batch = DataCollatorWithFlattening(**how)(documents)
    assert ("cu_seq_lens_q" if flash_arguments else "position_ids") in batch
    loss = model(**{k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}).loss
    scored = [
        model(ids, labels=ids, num_items_in_batch=13).loss
        for ids in (torch.tensor([d["input_ids"]]) for d in documents)
    ]
    torch.testing.assert_close(loss, sum(scored))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tiny_config, tokens, tmp_path, checkpointing):
    torch.manual_seed(0)
    model = MetaLAForCausalLM(tiny_config())
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 12)]

    def run(batch: int, accumulate: int) -> list[float]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=checkpointing,
            eval_strategy="steps",
            eval_steps=6,
            save_strategy="no",
            seed=0,
        )
        trainer = Trainer(
            copy.deepcopy(model), arguments, train_dataset=rows, eval_dataset=rows[:4]
        )
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        history = trainer.state.log_history
        assert any("eval_loss" in entry for entry in history)
        return [entry["loss"] for entry in history if "loss" in entry]

    whole, pieces = run(8, 1), run(2, 4)
    assert whole[-1] < whole[0]
    assert whole == pytest.approx(pieces, rel=2e-3)  # gradient accumulation changes nothing


@pytest.mark.parametrize("changes", [{}, {"norm_type": "rmsnorm", "bias": True}, HYBRID], ids=str)
def test_weight_decay_of_the_trainer(tiny_model, tmp_path, changes):
    """Matrices and convolutions decay; biases, norms and `aug_balance` do not."""
    model = tiny_model(**changes)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=0.1, weight_decay=0.5, report_to=[], use_cpu=True
    )
    optimizer = Trainer(model, arguments).create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = name.endswith(("bias", "norm.weight", "aug_balance"))
        torch.testing.assert_close(parameter, before[name] * (1.0 if kept else 0.95))
    assert any("aug_balance" in name for name in before)


def test_weight_decay_of_other_models_is_unchanged(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    decayed = Trainer(model, arguments).get_decay_parameter_names(model)
    assert set(decayed) == {n for n, _ in model.named_parameters() if "norm" not in n}


def test_label_smoothing_of_the_trainer(tiny_model, tokens, tmp_path):
    """Label smoothing takes the labels away from the model. They are shifted nevertheless."""
    model, ids = tiny_model(), tokens(2, 9)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True
    )
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    scores = model(ids).logits[:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(scores, ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True], ids=["whole model", "autocast"])
def test_training_in_half_precision(tiny_model, tokens, dtype, autocast):
    exact, input_ids = tiny_model(torch.float64).train(), tokens(2, 9)
    expected = exact(input_ids, labels=input_ids)
    model = tiny_model()
    if not autocast:
        model = model.half() if dtype == torch.float16 else model.bfloat16()
    model.train()
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        output = model(input_ids, labels=input_ids, use_cache=True)
        again = model(input_ids, past_key_values=copy.deepcopy(output.past_key_values))
    assert output.logits.dtype == dtype and again.logits.isfinite().all()
    assert output.loss.dtype == torch.float32  # transformers computes it so
    assert all(s.recurrent_states.dtype == torch.float32 for s in output.past_key_values.layers)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    output.loss.backward()
    wanted = gradients(exact, expected.loss)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.double()
        assert F.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0) > 0.97, name
    norm = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    error = torch.cat([(p.grad - wanted[n]).flatten() for n, p in model.named_parameters()]).norm()
    assert error < 16 * torch.finfo(dtype).eps * norm


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["nothing", "mask", "cu_seqlens", "checkpointing"])
def test_torch_compile_without_graph_breaks(tiny_model, tokens, kind, given):
    """`aot_eager` traces forward and backward and runs the traced graph. `inductor` would take one
    and a half minutes on the CPU. Pure MetaLA has one layer here, the hybrid one of each kind.
    Packing by `position_ids` reads them and breaks the graph; packing by `cu_seqlens` does not."""
    if given == "cu_seqlens" and kind == "hybrid":
        pytest.skip("attention layers run packed documents one by one: as many as the data has")
    layers = {"metala": 1, "hybrid": 2}[kind]
    model = tiny_model(torch.float64, decoder_layers=layers, **KINDS[kind]).train()
    torch._dynamo.reset()
    input_ids = tokens(1 if given == "cu_seqlens" else 2, 9)
    how = dict(labels=input_ids, use_cache=False)
    if given == "mask":
        how["attention_mask"] = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    elif given == "cu_seqlens":
        how["cu_seqlens"] = torch.tensor([0, 4, 9])
    elif given == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, output = model(input_ids, **how), compiled(input_ids, **how)
    same(output.loss, expected.loss)
    one, other = (gradients(model, o.loss) for o in (output, expected))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-8)
