"""`generate`: each strategy with and without the cache, and batches compared with single rows."""

import copy
import threading

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from megatron_patch.hf import MetaLACache
from tests.hf.conftest import NO_END

TRANSFORMERS = Version(transformers.__version__)


@pytest.fixture
def counted(model, monkeypatch):
    """A list of the numbers of tokens that the calls of the model read."""
    lengths, forward = [], type(model.model).forward

    def count(self, input_ids=None, *args, inputs_embeds=None, **kwargs):
        lengths.append((input_ids if inputs_embeds is None else inputs_embeds).shape[1])
        return forward(self, input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", count)
    return lengths


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rows of different lengths as a batch with token 0 on the left, and its mask."""
    time = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (time - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(time) >= time - len(row) for row in rows]).long()
    return ids, mask


STRATEGIES = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=0.7, top_p=0.9),
    "several samples": dict(do_sample=True, num_return_sequences=3),
    "beams": dict(do_sample=False, num_beams=4, num_return_sequences=3),
    "sampled beams": dict(do_sample=True, num_beams=3),
    "penalties": dict(do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=2),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_with_and_without_the_cache(model, tokens, strategy, padded):
    rows = list(tokens(3, 7))
    if padded:
        rows = [rows[0], rows[1][:3], rows[2][:5]]
    ids, mask = left_padded(rows)

    def run(**how):
        torch.manual_seed(3)
        settings = {**STRATEGIES[strategy], **NO_END, **how}
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, **settings)

    cached = run(use_cache=True)
    assert cached.shape == (3 * STRATEGIES[strategy].get("num_return_sequences", 1), 15)
    assert torch.equal(cached, run(use_cache=False))


def test_greedy_is_the_argmax_of_one_run(model, tokens, counted):
    out = model.generate(tokens(2, 6), max_new_tokens=7, do_sample=False, **NO_END)
    assert counted == [6] + [1] * 6
    logits = model(out[:, :-1]).logits[:, 5:]
    assert torch.equal(logits.argmax(-1), out[:, 6:])


@pytest.mark.parametrize("strategy", [dict(), dict(num_beams=3)], ids=["greedy", "beams"])
def test_a_left_padded_batch_equals_single_rows(model, tokens, strategy):
    rows = [row[:length] for row, length in zip(tokens(4, 9), (9, 2, 5, 1), strict=True)]
    ids, mask = left_padded(rows)
    how = dict(max_new_tokens=8, do_sample=False, **strategy, **NO_END)
    together = model.generate(ids, attention_mask=mask, **how)
    for row, out in zip(rows, together, strict=True):
        alone = model.generate(row[None], **how)[0]
        assert torch.equal(out[-8:], alone[-8:])
    single = model.generate(ids[1:2], attention_mask=mask[1:2], **how)  # padding in a batch of one
    assert torch.equal(single[0], together[1])


@pytest.mark.filterwarnings("ignore:.*right-padding")
@pytest.mark.parametrize("side", ["right", "both", "middle"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("strategy", [dict(), dict(num_beams=3)], ids=["greedy", "beams"])
def test_padding_anywhere_equals_single_rows(model, tokens, side, use_cache, strategy):
    """Prompts as ids and as embeddings."""
    masks = {
        "right": [[1] * 9, [1] * 2 + [0] * 7, [1] * 5 + [0] * 4],
        "both": [[0] * 3 + [1] * 6, [0] * 4 + [1] + [0] * 4, [1] * 3 + [0] * 6],
        "middle": [[1] * 3 + [0] * 2 + [1] * 4, [1, 0] * 4 + [1], [1] * 4 + [0] * 4 + [1]],
    }
    ids, mask = tokens(3, 9), torch.tensor(masks[side])
    ids = ids.masked_fill(mask == 0, 0)
    how = dict(max_new_tokens=5, do_sample=False, use_cache=use_cache, **strategy, **NO_END)
    together = model.generate(ids, attention_mask=mask, **how)[:, -5:]
    embeds = model.model.embed_tokens(ids)
    by_embeds = model.generate(inputs_embeds=embeds, attention_mask=mask, **how)
    assert torch.equal(by_embeds[:, -5:], together)
    for row, keep in enumerate(mask.bool()):
        alone = model.generate(ids[row : row + 1, keep], **how)
        assert torch.equal(together[row], alone[0, -5:])


@pytest.mark.parametrize("strategy", [dict(), dict(num_beams=3)], ids=["greedy", "beams"])
def test_continuing_from_a_returned_cache(model, tokens, counted, strategy):
    how = dict(do_sample=False, return_dict_in_generate=True, **NO_END)
    first = model.generate(tokens(2, 6), max_new_tokens=4, **how)
    cache = first.past_key_values
    assert isinstance(cache, MetaLACache) and cache.get_seq_length() == 9
    prompt = torch.cat([first.sequences, tokens(2, 5, seed=1)], dim=1)
    if strategy:
        cache.batch_repeat_interleave(3)
    counted.clear()
    second = model.generate(prompt, max_new_tokens=4, past_key_values=cache, **strategy, **how)
    assert counted[0] == 6  # the last generated token and the new ones
    assert torch.equal(
        second.sequences, model.generate(prompt, max_new_tokens=4, **strategy, **how).sequences
    )
    assert cache.get_seq_length() == 18


def test_a_padded_conversation_of_two_turns(model, tokens):
    """Left padding in both turns of a batch; the second turn continues from the cache."""
    first, mask = left_padded([tokens(1, 6)[0], tokens(1, 3, seed=1)[0]])
    second, second_mask = left_padded([tokens(1, 2, seed=2)[0], tokens(1, 5, seed=3)[0]])
    how = dict(max_new_tokens=5, do_sample=False, **NO_END)
    cache = model(first, attention_mask=mask).past_key_values
    ids, masks = torch.cat([first, second], 1), torch.cat([mask, second_mask], 1)
    out = model.generate(ids, attention_mask=masks, past_key_values=cache, **how)
    for row in range(2):
        alone = model.generate(ids[row : row + 1, masks[row].bool()], **how)
        assert torch.equal(out[row, -5:], alone[0, -5:])


def test_rows_that_ended_early_are_not_continued(model, tokens):
    """Their states have read padding until the last row ended, which cannot be undone."""
    first, mask = left_padded([tokens(1, 6)[0], tokens(1, 3, seed=1)[0]])
    out = model.generate(
        first,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda row, ids: [2] if (row, len(ids)) == (0, 8) else [5, 6, 7],
        return_dict_in_generate=True,
    )
    cache, ids = out.past_key_values, torch.cat([out.sequences, tokens(2, 2, seed=2)], 1)
    mask, new = (ids != 0).long(), ids[:, cache.get_seq_length() :]
    assert mask[0].tolist() == [1] * 9 + [0] * 3 + [1] * 2
    with pytest.raises(ValueError, match="^attention_mask: found padding among the tokens before"):
        model(new, attention_mask=mask, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1]))
    logits = model(new[1:], attention_mask=mask[1:], past_key_values=cache).logits
    whole = model(ids[1:], attention_mask=mask[1:]).logits
    torch.testing.assert_close(logits, whole[:, -new.shape[1] :])


def test_a_given_cache_is_filled(model, tokens):
    cache = MetaLACache(model.config)
    out = model.generate(
        tokens(1, 5), past_key_values=cache, max_new_tokens=3, do_sample=False, **NO_END
    )
    assert cache.get_seq_length() == 7
    fork = copy.deepcopy(cache)
    logits = model(out[:, -1:], past_key_values=fork).logits
    torch.testing.assert_close(logits[:, -1], model(out).logits[:, -1])


@pytest.mark.parametrize("length", [5, 3])
def test_a_cache_that_has_read_the_whole_prompt_is_refused(model, tokens, length):
    """transformers 5 would read the prompt, or a part of it, a second time."""
    ids = tokens(2, 5)
    for how in (dict(), dict(num_beams=2)):
        cache = model(ids, use_cache=True).past_key_values
        if how:
            cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="a cache that has read 5 tokens, wanted"):
            model.generate(ids[:, :length], past_key_values=cache, max_new_tokens=3, **how)


@pytest.mark.skipif(TRANSFORMERS < Version("4.57"), reason="generate has no prefill_chunk_size")
@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_in_chunks(model, tokens, counted, side):
    ids, mask = left_padded([tokens(1, 11)[0], tokens(1, 4)[0]])
    if side == "right":
        ids, mask = (torch.stack([x[0], x[1].roll(4)]) for x in (ids, mask))
    how = dict(max_new_tokens=4, do_sample=False, **NO_END)
    expected = model.generate(ids, attention_mask=mask, **how)
    counted.clear()
    out = model.generate(ids, attention_mask=mask, prefill_chunk_size=4, **how)
    assert counted[:2] == [4, 4] and max(counted) == 4
    assert torch.equal(out, expected)


def test_prompts_as_embeddings(model, tokens):
    ids = tokens(2, 5)
    how = dict(max_new_tokens=4, do_sample=False, **NO_END)
    out = model.generate(inputs_embeds=model.model.embed_tokens(ids), **how)
    assert torch.equal(out, model.generate(ids, **how)[:, 5:])


def test_stopping(model, tokens):
    ids = tokens(1, 5)
    long = model.generate(ids, max_new_tokens=9, do_sample=False, **NO_END)
    end = long[0, 8].item()
    out = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=end, pad_token_id=0)
    stop = (long[0, 5:] == end).nonzero()[0, 0].item() + 6
    assert torch.equal(out[0], long[0, :stop])

    class AtEnd(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == end

    criteria = StoppingCriteriaList([AtEnd()])
    out = model.generate(
        ids, max_new_tokens=9, do_sample=False, stopping_criteria=criteria, **NO_END
    )
    assert torch.equal(out[0], long[0, :stop])


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 61)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


def test_streaming_and_pipeline(model, tokenizer):
    prompts = ["w5 w9 w30", "w7", "w8 w8 w8 w8 w11"]
    how = dict(max_new_tokens=6, do_sample=False, suppress_tokens=[0, 1, 2])
    inputs = [tokenizer(p, return_tensors="pt", return_token_type_ids=False) for p in prompts]
    texts = [
        tokenizer.decode(model.generate(**i, **how)[0], skip_special_tokens=True) for i in inputs
    ]

    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    thread = threading.Thread(
        target=model.generate, kwargs=dict(**inputs[0], **how, streamer=streamer)
    )
    thread.start()
    assert "".join(streamer).replace(" ", "") == texts[0].replace(" ", "")
    thread.join()

    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for batch_size in (1, 3):
        results = write(prompts, batch_size=batch_size, **how)
        for result, text in zip(results, texts, strict=True):
            assert result[0]["generated_text"].replace(" ", "") == text.replace(" ", "")


def test_a_text_stops_at_a_string(model):
    from tokenizers import Tokenizer, decoders, models

    characters = Tokenizer(models.BPE({chr(ord("A") + i): i for i in range(61)}, []))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    ids, how = torch.tensor([[5, 9, 30]]), dict(max_new_tokens=6, do_sample=False)
    whole = model.generate(ids, **how, **NO_END)[0]
    stop = tokenizer.decode(whole[4:6]).replace(" ", "")
    stopped = model.generate(ids, **how, **NO_END, stop_strings=[stop], tokenizer=tokenizer)[0]
    assert stop not in tokenizer.decode(whole[3:5]).replace(" ", "")
    assert torch.equal(stopped, whole[:6])


def test_methods_that_a_state_cannot_follow_are_refused(model, tiny_model, tokens):
    ids = tokens(1, 5)
    stateful = "not supported with stateful models, such as MetaLAForCausalLM"
    for how in (dict(assistant_model=tiny_model()), dict(prompt_lookup_num_tokens=3)):
        with pytest.raises(ValueError, match=f"assisted generation is {stateful}"):
            model.generate(ids, max_new_tokens=3, **how)
    for use_cache in (None, False, True):
        with pytest.raises(ValueError, match=f"contrastive search is {stateful}"):
            how = dict(penalty_alpha=0.6, top_k=4, use_cache=use_cache)
            model.generate(ids, max_new_tokens=3, **how)
    for more in (dict(), dict(return_dict_in_generate=True)):
        with pytest.raises(ValueError, match="return_legacy_cache"):
            model.generate(ids, max_new_tokens=3, return_legacy_cache=True, **more)
    if hasattr(model, "generate_batch"):  # transformers 5
        with pytest.raises(ValueError, match=f"continuous batching is {stateful}"):
            model.generate_batch(ids.tolist())

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    target = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).eval()
    with pytest.raises(ValueError, match="cannot be an assistant model"):
        target.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=model)


@pytest.mark.filterwarnings("ignore:This model does not support")
def test_other_cache_implementations_have_no_effect(model, tokens):
    how = dict(max_new_tokens=3, do_sample=False, **NO_END)
    expected = model.generate(tokens(1, 5), **how)
    for name in ("static", "offloaded_static"):
        out = model.generate(tokens(1, 5), cache_implementation=name, **how)
        assert torch.equal(out, expected)


def test_the_mask_is_dropped_after_the_prompt(model, tokens, monkeypatch):
    """After the prompt, no mask is extended or read."""
    masks, forward = [], type(model).forward

    def note(self, *args, attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(type(model), "forward", note)
    ids, mask = left_padded([tokens(1, 5)[0], tokens(1, 3)[0]])
    model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **NO_END)
    assert torch.equal(masks[0], mask) and masks[1:] == [None] * 3
