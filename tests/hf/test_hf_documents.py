"""Packed documents: arguments that separate them, compared with runs of the documents alone, and
arguments that are refused by name."""

import copy
import inspect

import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from megatron_patch.hf import MetaLACache
from tests.hf.conftest import NO_END, same

TRANSFORMERS_4 = transformers.__version__.startswith("4.")


# For each row the columns of its documents, and the arguments that describe them.
ARGUMENTS = {
    "one text with gaps": (
        [[range(8)], [range(8)]],
        dict(position_ids=[[0, 1, 2, 5, 6, 7, 20, 21]]),
    ),
    "one text with padding inside, positions of columns": (
        [[[0, 1, 2, 5, 6, 7]], [[2, 3, 4, 5]]],
        dict(
            attention_mask=[[1, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0]],
            position_ids=[[0, 1, 2, 3, 4, 5, 6, 7]],
        ),
    ),
    "a gap and a restart": (
        [[range(4), range(4, 8)], [range(8)]],
        dict(position_ids=[[0, 1, 4, 5, 3, 4, 9, 11], [3, 4, 5, 6, 7, 8, 9, 10]]),
    ),
    "a repeated position": (
        [[range(2), range(2, 8)], [range(7), [7]]],
        dict(position_ids=[[0, 1, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 6]]),
    ),
    "seq_idx": (
        [[range(3), range(3, 4), range(4, 8)], [range(8)]],
        dict(seq_idx=[[0, 0, 0, 1, 2, 2, 2, 2], [5] * 8]),
    ),
    "seq_idx for all rows": (
        [[range(3), range(3, 8)], [range(3), range(3, 8)]],
        dict(seq_idx=[[0, 0, 0, 1, 1, 1, 1, 1]]),
    ),
    "seq_idx, and padding as -1": (
        [[range(3), range(3, 6)], [range(1, 8)]],
        dict(seq_idx=[[0, 0, 0, 1, 1, 1, -1, -1], [-1, 0, 0, 0, 0, 0, 0, 0]]),
    ),
    "seq_idx beside a mask": (
        [[[0, 1, 4], [6, 7]], [range(4)]],
        dict(
            seq_idx=[[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]],
            attention_mask=[[1, 1, 0, 0, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]],
        ),
    ),
    "documents numbered in the mask": (
        [[range(2), range(2, 5), [7]], [[1, 2, 3], [4, 5]]],
        dict(attention_mask=[[1, 1, 2, 2, 2, 0, 0, 3], [0, 4, 4, 4, 1, 1, 0, 0]]),
    ),
    "one number, which is not 1": (
        [[range(8)], [range(5)]],
        dict(attention_mask=[[2] * 8, [3] * 5 + [0] * 3]),
    ),
    "numbers as floats, and positions": (
        [[range(3), range(3, 6), range(6, 8)], [range(8)]],
        dict(
            attention_mask=[[1.0] * 3 + [2.0] * 5, [1.0] * 8],
            position_ids=[[0, 1, 2, 0, 1, 2, 0, 1], list(range(8))],
        ),
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_documents_do_not_see_each_other(model, tokens, name):
    rows, arguments = ARGUMENTS[name]
    ids = tokens(2, 8)
    arguments = {key: torch.tensor(value) for key, value in arguments.items()}
    found = model(ids, use_cache=False, **arguments).logits
    embeds = model.model.embed_tokens(ids)
    same(model(inputs_embeds=embeds, use_cache=False, **arguments).logits, found)
    for row, documents in enumerate(rows):
        for columns in map(list, documents):
            same(found[row, columns], model(ids[row : row + 1, columns]).logits[0])


@pytest.mark.parametrize("given", ["cu_seq_lens_q", "cu_seq_lens_k", "both"])
@pytest.mark.parametrize("bounds", [[0, 3, 8], [0, 0, 3, 3, 8, 8]], ids=["", "empty documents"])
def test_flash_attention_names_for_cu_seqlens(model, tokens, given, bounds):
    ids, bounds = tokens(1, 8), torch.tensor(bounds, dtype=torch.int32)
    names = ["cu_seq_lens_q", "cu_seq_lens_k"] if given == "both" else [given]
    arguments = {name: bounds.clone() for name in names} | dict(max_length_q=5, max_length_k=5)
    found = model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), **arguments).logits
    alone = [model(piece).logits for piece in (ids[:, :3], ids[:, 3:])]
    same(found, torch.cat(alone, dim=1))
    with pytest.raises(ValueError, match=f"a document that begins where {names[0]} has no bound"):
        model(ids, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5]]), **arguments)


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4.46 writes no seq_idx")
def test_seq_idx_of_the_collator(model, tokens):
    documents = [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in (5, 8, 3)]
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_position_ids=False)
    batch = collate(documents)
    assert "seq_idx" in batch and "position_ids" not in batch
    loss = model(**batch, use_cache=False).loss
    scored = [
        model(ids, labels=ids, num_items_in_batch=13).loss
        for ids in (torch.tensor([d["input_ids"]]) for d in documents)
    ]
    torch.testing.assert_close(loss, sum(scored))


def test_trainer_keeps_the_columns_that_separate_documents(model, tmp_path):
    """The Trainer removes columns that `forward` does not name."""
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(copy.deepcopy(model), arguments)
    trainer._set_signature_columns_if_needed()
    kept = {"attention_mask", "position_ids", "seq_idx", "cu_seqlens"}
    assert kept <= set(trainer._signature_columns)
    for part in (model, model.model):
        assert kept <= set(inspect.signature(part.forward).parameters)


def test_unknown_arguments_are_refused_by_name(model, tokens):
    ids = tokens(1, 8)
    two_types = torch.tensor([[0] * 4 + [1] * 4])
    refused = dict(
        token_type_ids=two_types,
        segment_ids=two_types,
        document_ids=two_types,
        sequence_ids=two_types.tolist(),
        packed_seq_params=object(),
        padding_mask=two_types,
        head_mask=torch.ones(2),
        encoder_hidden_states=torch.ones(1, 8, 32),
        position_embeddings=(ids, ids),
        cache_params=MetaLACache(model.config),
        is_causal=False,
        anything=True,
    )
    for part in (model, model.model):
        for name, value in refused.items():
            with pytest.raises(ValueError, match=f"^{name}: found "):
                part(ids, **{name: value})
            part(ids, **{name: None})
    unread = dict(
        token_type_ids=torch.ones_like(ids),
        is_causal=True,
        cache_position=torch.arange(8),
        output_attentions=True,
        output_router_logits=False,
        max_length_q=8,
        num_items_in_batch=torch.tensor(3),
    )
    for part in (model, model.model):
        same(part(ids, **unread)[0], part(ids)[0])


def test_arguments_of_the_loss_function(model, tokens):
    """The loss function gets the arguments it names; others are refused."""
    ids = tokens(1, 8)
    labels = ids.masked_fill(ids == ids[0, 3], -7)
    expected = model(ids, labels=labels.masked_fill(labels == -7, -100)).loss
    same(model(ids, labels=labels, ignore_index=-7).loss, expected)
    if TRANSFORMERS_4:
        with pytest.raises(ValueError, match="^shift_labels: "):
            model(ids, labels=ids, shift_labels=ids)


MASKS = {
    "additive": (torch.tensor([[0.0, 0.0, -1e9, 0.0]]), "below 0"),
    "infinite": (torch.tensor([[0.0, 0.0, -torch.inf, 0.0]]), "below 0"),
    "not a number": (torch.tensor([[1.0, 1.0, torch.nan, 1.0]]), "below 0"),
    "weights": (torch.tensor([[1.0, 0.5, 1.0, 1.0]]), "between whole numbers"),
    "four dimensions": (torch.ones(1, 1, 4, 4), r"found \[1, 1, 4, 4\]"),
    "boolean, of four": (torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(), r"found \[1, 1, 4, 4\]"),
    "three dimensions": (torch.ones(1, 4, 4), r"found \[1, 4, 4\]"),
    "one by the kind of layer": ({"full_attention": torch.ones(1, 4)}, "found a dict"),
    "a list": ([[1, 1, 1, 1]], "found a list"),
}


@pytest.mark.parametrize("name", MASKS)
def test_invalid_masks_are_refused(model, tokens, name):
    mask, message = MASKS[name]
    with pytest.raises(ValueError, match=f"^attention_mask: .*{message}"):
        model(tokens(1, 4), attention_mask=mask)


CU_SEQLENS = {
    "too short": [0, 3],
    "too long": [0, 9],
    "not from 0": [1, 5],
    "falling": [0, 3, 2, 5],
    "of two dimensions": [[0, 5]],
    "floats": [0.0, 5.0],
    "one": [5],
    "none": [],
}


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"])
@pytest.mark.parametrize("bounds", CU_SEQLENS)
def test_invalid_cu_seqlens_are_refused(model, tokens, name, bounds):
    bounds = torch.tensor(CU_SEQLENS[bounds])
    with pytest.raises(ValueError, match=f"^{name}: found .*wanted int32 or int64"):
        model(tokens(1, 5), **{name: bounds})


def test_contradicting_cu_seqlens_are_refused(model, tokens):
    ids, bounds = tokens(1, 5), torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match="^cu_seqlens: found a list"):
        model(ids, cu_seqlens=[0, 2, 5])
    for other in ([0, 3, 5], [0, 5]):
        with pytest.raises(ValueError, match="^cu_seq_lens_k: found .*boundaries"):
            model(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=torch.tensor(other))
    with pytest.raises(ValueError, match=r"^seq_idx: found \[1, 4\], wanted \[1, 5\]"):
        model(ids, seq_idx=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="^cu_seq_lens_q: found with batch 2"):
        model(tokens(2, 5), cu_seq_lens_q=bounds)


def test_a_cache_continues_one_document(model, tokens):
    ids, more = tokens(2, 5), tokens(2, 4, seed=1)
    cache = model(ids).past_key_values
    expected = model(more, past_key_values=copy.deepcopy(cache)).logits
    for how in (
        dict(position_ids=torch.tensor([[5, 6, 9, 10]])),
        dict(position_ids=torch.arange(4)[None]),  # counted from the call's start
        dict(seq_idx=torch.full((2, 4), 3)),
        dict(attention_mask=torch.full((2, 9), 2)),
    ):
        same(model(more, past_key_values=copy.deepcopy(cache), **how).logits, expected)
    for how in (
        dict(position_ids=torch.tensor([[5, 6, 0, 1]])),
        dict(seq_idx=torch.tensor([[0, 0, 0, 1]])),
        dict(attention_mask=torch.tensor([[1] * 8 + [2], [1] * 9])),
        dict(attention_mask=torch.tensor([[1] * 5 + [2] * 4, [1] * 9])),
    ):
        with pytest.raises(ValueError, match="document.* from a cache"):
            model(more, past_key_values=copy.deepcopy(cache), **how)
    with pytest.raises(ValueError, match="^cu_seq_lens_q: found with .*continued cache True"):
        model(
            more[:1],
            past_key_values=model(ids[:1]).past_key_values,
            cu_seq_lens_q=torch.tensor([0, 4]),
        )
    for how in (
        dict(seq_idx=torch.tensor([[0, 0, 0, 1]])),
        dict(attention_mask=torch.tensor([[1, 1, 1, 2]] * 2)),
    ):
        with pytest.raises(ValueError, match="^use_cache, past_key_values: "):
            model(more, use_cache=True, **how)


@pytest.mark.parametrize("use_cache", [False, True])
def test_generate_continues_one_document_per_row(model, tokens, use_cache):
    ids = tokens(2, 4)
    how = dict(max_new_tokens=3, do_sample=False, use_cache=use_cache, **NO_END)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = model.generate(ids, attention_mask=mask, **how)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    found = model.generate(ids, attention_mask=mask, position_ids=positions, **how)
    assert torch.equal(found, expected)
    restart = torch.tensor([[0, 1, 0, 1]] * 2)
    for name, value in (
        ("position_ids", restart),
        ("seq_idx", torch.zeros_like(ids)),
        ("cu_seqlens", torch.tensor([0, 4])),
        ("attention_mask", torch.tensor([[1, 1, 2, 2]] * 2)),
        ("attention_mask", torch.tensor([[2, 2, 2, 2]] * 2)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: found several documents in a row"):
            model.generate(ids, **{name: value}, **how)
    with pytest.raises(ValueError, match=r"^position_ids: found \[3, 2, 4\], wanted \[B, T\]"):
        model.generate(ids, position_ids=restart.expand(3, 2, 4), **how)


def test_compiled_graphs_refuse_document_numbers(tiny_model, tokens):
    """A compiled graph cannot read a mask before it runs, so it must not ignore its numbers."""
    model, ids = tiny_model(torch.float64, decoder_layers=1).requires_grad_(False), tokens(1, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    types = torch.zeros_like(ids)
    found = compiled(ids, attention_mask=mask, token_type_ids=types, use_cache=False).logits
    same(found[:, 2:], model(ids[:, 2:]).logits)
    with pytest.raises(RuntimeError, match="attention_mask: found values other than 0 and 1"):
        compiled(ids, attention_mask=mask + 1, token_type_ids=types, use_cache=False)
    with pytest.raises(RuntimeError, match="token_type_ids: found tokens of several types"):
        compiled(ids, attention_mask=mask, token_type_ids=mask, use_cache=False)
