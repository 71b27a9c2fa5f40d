"""`metala: {reset_at_document: true}`: a packed sample is its documents, each on its own."""

from __future__ import annotations

import pytest

# One packed batch through GPT-NeoX's own functions, in float64, and each document alone: largest
# differences of logits, and of the parameters' gradients relative to the largest one.
PACKED_AND_ALONE = """
    from functools import partial
    from megatron import training
    eod = neox_args.tokenizer.eod
    model = training.get_model(neox_args).double()
    model.set_batch_fn(partial(training.get_batch_sequential, neox_args=neox_args))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "aug_balance" in name or "bias" in name:
            torch.nn.init.normal_(p)
    text = torch.randint(2, 512, (3, 41))
    # documents of one token, one that ends with the row, one that fills it, and an empty one
    for row, ends in enumerate([(0, 6, 7, 22), (12, 39), ()]):
        text[row, list(ends)] = eod
    text[2, 39:] = eod

    def run(text):
        batch = training._get_batch(neox_args, None, ["text"], {"text": text}, torch.int64)
        tokens, _, _, mask, positions = batch
        model.zero_grad()
        logits = model((tokens, positions, mask))
        weights = torch.cos(torch.arange(512) + tokens[..., None].double())
        (logits * weights).sum().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters()], mask

    logits, gradients, mask = run(text)
    alone, sums = [], None
    for row in text[:, :-1]:
        ends = [i + 1 for i, token in enumerate(row) if token == eod]
        for a, b in zip([0, *ends], [*ends, len(row)]):
            if a < b:
                found, parts, _ = run(torch.cat([row[a:b], row[:1]])[None])
                alone.append(found[0])
                sums = parts if sums is None else [x + y for x, y in zip(sums, parts)]
    largest = max(x.abs().max() for x in sums)
    apart = [(x - y).abs().max() for x, y in zip(gradients, sums)]
    difference = (logits.flatten(0, 1) - torch.cat(alone)).abs().max()
    answer([difference.item(), (max(apart) / largest).item(), list(mask.shape)])
"""
HYBRID = {"attention_config": ["global", "metala"]}


@pytest.mark.parametrize(
    ("changes", "mask"),
    [
        ({}, [3, 1, 1, 40]),
        ({"checkpoint_activations": True}, [3, 1, 1, 40]),
        (HYBRID, [3, 1, 40, 40]),
        ({**HYBRID, "pos_emb": "learned"}, [3, 1, 40, 40]),
    ],
)
def test_a_packed_batch_is_its_documents(in_neox, config, changes, mask):
    config["metala"] = {"reset_at_document": True}
    logits, gradients, shape = in_neox({**config, **changes}, PACKED_AND_ALONE)
    assert logits < 1e-10 and gradients < 1e-10
    assert shape == mask


@pytest.mark.parametrize("changes", [{}, HYBRID])
def test_without_the_setting_documents_see_each_other(in_neox, config, changes):
    logits, gradients, _ = in_neox({**config, **changes}, PACKED_AND_ALONE)
    assert logits > 1e-3 and gradients > 1e-3
