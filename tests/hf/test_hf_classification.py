"""Models that give a sequence numbers, such as exported reward models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from megatron_patch.hf import MetaLAForSequenceClassification


@pytest.fixture
def model(tiny_config) -> MetaLAForSequenceClassification:
    return MetaLAForSequenceClassification(tiny_config(num_labels=1)).eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_has_the_number_of_its_last_token(model, side):
    rows = [torch.randint(3, 60, (length,)) for length in (5, 70, 1)]
    ids, mask = torch.full((3, 70), 2), torch.zeros(3, 70, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(70 - len(row), 70) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    with torch.no_grad():
        alone = [model.score(model.model(row[None])[0])[0, -1] for row in rows]
        found = model(ids, attention_mask=mask).logits
    assert found.shape == (3, 1)
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-5)


def test_loss_and_gradient(model):
    ids, labels = torch.randint(3, 60, (4, 9)), torch.randn(4)
    loss, logits = model(ids, labels=labels, use_cache=False, return_dict=False)
    assert loss.item() == pytest.approx(F.mse_loss(logits[:, 0], labels).item())
    loss.backward()
    assert model.score.weight.grad.abs().max() > 0


@pytest.mark.parametrize("num_labels", [1, 3])
def test_accumulation_is_one_large_batch(tiny_config, tmp_path, num_labels):
    model = MetaLAForSequenceClassification(tiny_config(num_labels=num_labels))
    values = torch.randn(8) if num_labels == 1 else torch.arange(8) % 3
    rows = [{"input_ids": torch.randint(3, 60, (9,)), "labels": value} for value in values]

    def norm_of_gradient(batch: int, accumulate: int) -> float:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            learning_rate=0.0,
            max_grad_norm=1e9,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return trainer.state.log_history[0]["grad_norm"]

    assert norm_of_gradient(2, 4) == pytest.approx(norm_of_gradient(8, 1), rel=1e-5)


def test_pipeline_in_batches(tiny_config):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    model = MetaLAForSequenceClassification(tiny_config(num_labels=3)).eval()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    texts = ["w5 w7 w9", "w11", "w30 w8"]
    for found, text in zip(classify(texts, batch_size=3), texts, strict=True):
        (alone,) = classify(text)
        assert found["label"] == alone["label"]
        assert found["score"] == pytest.approx(alone["score"], abs=1e-6)


def test_is_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is MetaLAForSequenceClassification and loaded.config.num_labels == 1
    ids = torch.randint(3, 60, (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
