"""Padding anywhere: results and state of a row equal those of the row without padding."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F

from megatron_patch.hf import MetaLACache
from tests.hf.conftest import same

ROWS = {
    "none": "11111111",
    "left": "00001111",
    "right": "11110000",
    "middle": "11000111",
    "scattered": "01011010",
    "one": "00010000",
    "all": "00000000",
}


def mask_of(*names: str) -> torch.Tensor:
    return torch.tensor([[int(bit) for bit in ROWS[name]] for name in names])


def check_rows(model, input_ids, mask, output, starts=None) -> None:
    """Compares each row of `output` with a run of its tokens alone, from its state in `starts`."""
    for row, keep in enumerate(mask.bool()):
        start = None
        if starts is not None:
            start = copy.deepcopy(starts)
            start.batch_select_indices(torch.tensor([row]))
        columns = torch.ones(output.past_key_values.get_seq_length(), dtype=torch.bool)
        if (padding := output.past_key_values.key_padding) is not None:
            columns[: padding.shape[1]] = ~padding[row]
        if keep.any():
            alone = model(input_ids[row : row + 1, keep], past_key_values=start)
            same(output.logits[row, keep], alone.logits[0])
            start = alone.past_key_values
        for layer, state in enumerate(output.past_key_values.layers):
            for name, tensor in state.tensors():
                tensor = tensor[row : row + 1]
                if name in ("keys", "values"):
                    tensor = tensor[:, :, columns]
                if start is None:  # the row has only padding
                    assert not tensor.any(), name
                else:
                    expected = getattr(start.layers[layer], name)
                    if name in ("keys", "values") and start.key_padding is not None:
                        rest = F.pad(start.key_padding, (0, expected.shape[2]))[0]
                        expected = expected[:, :, ~rest[: expected.shape[2]]]
                    same(tensor, expected)


@pytest.mark.parametrize("name", ROWS)
def test_a_batch_of_one(model, tokens, name):
    input_ids, mask = tokens(1, 8), mask_of(name)
    check_rows(model, input_ids, mask, model(input_ids, attention_mask=mask))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_a_batch_of_all_kinds_of_padding(model, tokens, dtype):
    input_ids, mask = tokens(len(ROWS), 8), mask_of(*ROWS)
    output = model(input_ids, attention_mask=mask.to(dtype), output_hidden_states=True)
    check_rows(model, input_ids, mask, output)
    embeds = model.model.embed_tokens(input_ids)
    same(output.hidden_states[0][mask.bool()], embeds[mask.bool()])  # in the order given
    by_embeds = model(inputs_embeds=embeds, attention_mask=mask.to(dtype))
    same(by_embeds.logits[mask.bool()], output.logits[mask.bool()])


@pytest.mark.parametrize(
    "changes", [{"conv_width": 1}, {"conv_width": 2}, {"conv_width": 7}], ids=str
)
def test_other_kernel_sizes(tiny_model, tokens, changes):
    model = tiny_model(torch.float64, **changes)
    input_ids, mask = tokens(len(ROWS), 8), mask_of(*ROWS)
    check_rows(model, input_ids, mask, model(input_ids, attention_mask=mask))
    with torch.no_grad():  # states are overwritten
        cache = model(input_ids, attention_mask=mask).past_key_values
        start = copy.deepcopy(cache)
        output = model(input_ids, attention_mask=mask, past_key_values=cache)
    check_rows(model, input_ids, mask, output, start)


@pytest.mark.parametrize("full_mask", [False, True], ids=["mask of the call", "mask of all tokens"])
@pytest.mark.parametrize("names", [["middle"], ["left"], list(ROWS)], ids=len)
def test_padding_after_a_cache(model, tokens, full_mask, names):
    before, input_ids = tokens(len(names), 5, seed=1), tokens(len(names), 8)
    first_mask = torch.tensor([[0, 0, 1, 1, 1]] * len(names))
    cache = model(before, attention_mask=first_mask).past_key_values
    start = copy.deepcopy(cache)
    mask = mask_of(*names)
    given = torch.cat([first_mask, mask], dim=1) if full_mask else mask
    output = model(input_ids, attention_mask=given, past_key_values=cache)
    check_rows(model, input_ids, mask, output, start)


def test_padding_in_single_token_steps(model, tokens):
    """A row that gets padding while others get tokens keeps its state."""
    input_ids, mask = tokens(len(ROWS), 8), mask_of(*ROWS)
    cache, logits = MetaLACache(model.config), []
    for t in range(8):
        step = model(
            input_ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache
        )
        logits.append(step.logits)
    step.logits = torch.cat(logits, dim=1)
    check_rows(model, input_ids, mask, step)


def test_trailing_padding_gives_what_the_last_token_gives(model, tokens):
    """Each row therefore continues from the last column, even in calls after its last token."""
    input_ids, mask = tokens(len(ROWS), 8), mask_of(*ROWS)
    whole = model(input_ids, attention_mask=mask, output_hidden_states=True)
    same(model.lm_head(whole.hidden_states[-1]), whole.logits)
    cache, logits = MetaLACache(model.config), []
    for columns in (slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 8)):
        seen = mask[:, : columns.stop]
        step = model(input_ids[:, columns], attention_mask=seen, past_key_values=cache)
        logits.append(step.logits)
        cache = copy.deepcopy(cache)
    for found in (whole.logits, torch.cat(logits, dim=1)):
        for row, keep in enumerate(mask.bool()):
            if not keep.any():
                continue
            alone = model(input_ids[row : row + 1, keep]).logits[0]
            same(found[row, keep], alone)
            behind = int(keep.nonzero()[-1]) + 1
            same(found[row, behind:], alone[-1:].expand(8 - behind, -1))


def test_last_hidden_moves_with_its_row(model, tokens, tmp_path):
    """`last_hidden` survives a reordering and a file."""
    input_ids, empty = tokens(3, 4), torch.zeros(3, 2, dtype=torch.long)
    output = model(input_ids, attention_mask=torch.tensor([[1, 1, 1, 0]] * 3))
    cache = output.past_key_values
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.save(tmp_path / "state")
    found = model(
        input_ids[:, :2],
        attention_mask=torch.cat([torch.tensor([[1, 1, 1, 0]] * 3), empty], dim=1),
        past_key_values=MetaLACache.load(tmp_path / "state"),
    ).logits
    same(found, output.logits[[2, 0, 0], 2:3].expand(-1, 2, -1))


@pytest.mark.parametrize("kind", ["left", "middle", "scattered", "right"])
def test_loss_and_gradients_are_those_without_padding(model, tokens, kind):
    """To float32's rounding, in which transformers computes the loss."""
    input_ids, mask = tokens(1, 8), mask_of(kind)
    labels = input_ids.masked_fill(mask == 0, -100)
    parameters = [p for p in model.parameters() if p.requires_grad]
    keep = mask[0].bool()
    padded = model(input_ids, attention_mask=mask, labels=labels).loss
    alone = model(input_ids[:, keep], labels=input_ids[:, keep]).loss
    found, expected = (torch.autograd.grad(loss, parameters) for loss in (padded, alone))
    torch.testing.assert_close((padded, *found), (alone, *expected), rtol=1e-6, atol=1e-7)


def test_labels_that_are_shifted_already(model, tokens):
    input_ids, mask = tokens(1, 8), mask_of("left")
    labels = input_ids.masked_fill(mask == 0, -100)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    read = inspect.signature(model.loss_function).parameters
    if "shift_labels" not in read:
        pytest.skip("this transformers has no shift_labels")
    found = model(input_ids, attention_mask=mask, labels=labels, shift_labels=shifted).loss
    same(found, model(input_ids, attention_mask=mask, labels=labels).loss)


@pytest.mark.parametrize("kind", ["left", "middle", "scattered"])
def test_results_at_padding_read_no_later_token(model, tokens, kind):
    """Those of the tokens before it count."""
    one, mask = tokens(1, 8), mask_of(kind)
    last = int(mask[0].nonzero()[-1])
    other = one.clone()
    other[0, last] = (one[0, last] + 1) % model.config.vocab_size
    first, second = (model(ids, attention_mask=mask).logits[0] for ids in (one, other))
    assert torch.equal(first[:last], second[:last])
    assert not torch.equal(first[last:], second[last:])
    assert not first[: int(mask[0].nonzero()[0])].any()


def test_token_ids_at_padding_do_not_matter(model, tokens):
    mask = mask_of("left", "scattered", "right")
    one, other = tokens(3, 8), tokens(3, 8, seed=5)
    other = torch.where(mask.bool(), one, other)
    first, second = (model(ids, attention_mask=mask) for ids in (one, other))
    assert torch.equal(first.logits[mask.bool()], second.logits[mask.bool()])


def test_half_precision_and_masks_of_ones(tiny_model, tokens):
    model, input_ids = tiny_model(torch.bfloat16), tokens(2, 8)
    ones = model(input_ids, attention_mask=torch.ones(2, 8)).logits
    assert torch.equal(ones, model(input_ids).logits)
    output = model(input_ids, attention_mask=mask_of("right", "all"))
    assert output.logits.isfinite().all()
    alone = model(input_ids[:1, :4])
    torch.testing.assert_close(output.logits[:1, :4], alone.logits, rtol=0.05, atol=0.05)
    for one, other in zip(output.past_key_values.layers, alone.past_key_values.layers, strict=True):
        torch.testing.assert_close(
            one.recurrent_states[:1], other.recurrent_states, rtol=0.05, atol=0.05
        )
        assert not one.recurrent_states[1].any()


@pytest.mark.parametrize("shape", [[2, 7], [2, 9], [1, 8], [2, 1, 8, 8]])
def test_masks_of_another_shape_are_refused(model, tokens, shape):
    with pytest.raises(ValueError, match=r"^attention_mask: found \[.*wanted \[2, 8\]"):
        model(tokens(2, 8), attention_mask=torch.ones(shape))
