"""`metala: {reset_at_document: true}`: a packed sample is its documents, each on its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from convert import reshape_neox
from megatron_patch.hf import MetaLAForCausalLM
from megatron_patch.indexed_dataset import IndexedDataset
from megatron_patch.trainer.samples import PackedSamples, split_documents
from tests.neox.conversion import convert, export
from tests.neox.training import Run, settings, train, train_once

EOD = 0  # <|endoftext|> of the test's tokenizer

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


@pytest.mark.parametrize(("row", "lines"), [(None, 1), (50, 0)])
def test_data_without_ends_are_told(in_neox, config, row, lines):
    code = """
    from megatron import training
    from megatron_patch.neox import documents
    lines, row = [], %r
    documents.say = lines.append
    for number in range(120):
        text = torch.full((2, 9), 7)
        if number == row:
            text[1, 3] = neox_args.tokenizer.eod
        training._get_batch(neox_args, None, ["text"], {"text": text}, torch.int64)
    answer(lines)
    """
    config["metala"] = {"reset_at_document": True}
    found = in_neox(config, code % row)
    assert len(found) == lines
    assert all("found no end-of-document token in the first batches" in line for line in found)


# ---- Real trainings

BATCH, ACCUMULATION, LENGTH, STEPS = 4, 2, 64, 3
RUN = {
    "metala": {"reset_at_document": True},
    "eod_mask_loss": True,
    "init_method_std": 0.1,  # what a token sees of its context changes the loss
    "gradient_accumulation_steps": ACCUMULATION,
    "train_iters": STEPS,
    "lr_decay_iters": STEPS,
    "checkpoint_factor": STEPS,
    "eval_interval": STEPS,
    "eval_iters": 1,
}
MODELS = {
    "metala": {},
    "hybrid": {"attention_config": ["global", "metala"], "pos_emb": "rotary"},
}
LAYOUTS = [
    ("metala", dict(tp=1, pp=2, checkpoint_activations=True)),
    ("metala", dict(tp=2, pp=0)),
    # the two micro-batches of a step, on two data-parallel ranks
    ("metala", dict(tp=1, pp=0, gradient_accumulation_steps=1, zero_optimization={"stage": 1})),
    ("hybrid", dict(tp=1, pp=2)),
    ("hybrid", dict(tp=2, pp=1, checkpoint_activations=True)),
]


@pytest.fixture(scope="module")
def one_rank(neox_checkout, short_documents, tokenizer_file, make_once):
    """Function: returns a model's run on one rank, and the folder of its checkpoints."""

    def run(name: str) -> tuple[Run, Path]:
        config = settings(short_documents, tokenizer_file, **RUN, **MODELS[name])
        found, folder = train_once(make_once, f"documents-{name}", neox_checkout, config)
        return found, folder / "checkpoints"

    return run


def losses_of_documents(model: MetaLAForCausalLM, prefix: Path) -> tuple[float, float]:
    """The loss of a run's first step: of each document alone, and of whole samples. An end of
    document does not count, since it would predict the next document."""
    data = IndexedDataset(prefix)
    documents, _, _ = split_documents("90,5,5", len(data))
    samples = PackedSamples(data, documents, LENGTH, STEPS * ACCUMULATION * BATCH, seed=1234)

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(tokens[None], use_cache=False).logits[0]
        return F.cross_entropy(logits, labels, reduction="none")[tokens != EOD]

    alone, whole = [], []
    for batch in range(ACCUMULATION):
        parts, rows = [], []
        for index in range(batch * BATCH, (batch + 1) * BATCH):
            tokens, labels = samples[index]["input_ids"], samples[index]["labels"]
            lengths = np.diff([0, *(np.flatnonzero(tokens == EOD) + 1), LENGTH])
            pieces = zip(
                tokens.split(lengths.tolist()), labels.split(lengths.tolist()), strict=True
            )
            parts += [loss(*piece) for piece in pieces if len(piece[0])]
            rows.append(loss(tokens, labels))
        alone.append(torch.cat(parts).mean().item())
        whole.append(torch.cat(rows).mean().item())
    return float(np.mean(alone)), float(np.mean(whole))


@pytest.mark.parametrize("name", MODELS)
def test_a_run_has_the_loss_of_its_documents_alone(
    neox_checkout, short_documents, one_rank, tmp_path, name
):
    """Against the exported model, which says how it was trained."""
    run, checkpoints = one_rank(name)
    export(neox_checkout, checkpoints, tmp_path / "hf", "--iteration", 0, "--verify")
    model = MetaLAForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        alone, whole = losses_of_documents(model, short_documents)
    assert run.losses[1] == pytest.approx(alone, abs=1e-5)
    assert abs(whole - alone) > 1e-3  # a hundred times the tolerance
    assert model.config.reset_at_document is True
    assert "documents of a packed sample were kept apart" in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_boundaries_reach_every_rank(
    neox_checkout, short_documents, tokenizer_file, one_rank, tmp_path, name, layout
):
    """Training and validation of two ranks are those of one."""
    run, checkpoints = one_rank(name)
    convert(
        reshape_neox, neox_checkout,
        "--checkpoint", checkpoints, "--iteration", 0, "--output", tmp_path / "step0",
        "--tensor-parallel", layout["tp"], "--pipeline-parallel", layout["pp"],
    )  # fmt: skip
    start = {"load": str(tmp_path / "step0"), "finetune": True, "num_gpus": 2}
    config = settings(short_documents, tokenizer_file, **{**RUN, **MODELS[name], **layout, **start})
    found = train(neox_checkout, config, tmp_path)
    assert len(found.losses) == STEPS and found.losses == pytest.approx(run.losses, abs=1e-5)
    assert found.validation_losses == pytest.approx(run.validation_losses, abs=1e-5)
    assert run.validation_losses


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, found none")
def test_captured_layers_train_alike(neox_checkout, short_documents, tokenizer_file, tmp_path):
    """On one GPU, with other numbers of documents in each micro-batch."""
    from tests.neox.test_gpus import MODEL, PRECISIONS

    runs = {}
    for graphs in ("auto", "never"):
        metala = {**MODEL["metala"], **RUN["metala"], "cuda_graphs": graphs}
        changes = {**RUN, **MODEL, **PRECISIONS["bfloat16"], "metala": metala, "train_iters": 10}
        config = settings(short_documents, tokenizer_file, num_gpus=1, **changes)
        runs[graphs] = train(neox_checkout, config, tmp_path / graphs)
    assert "CUDA graphs of 4 layers" in runs["auto"].output
    assert "CUDA graphs have room for" not in runs["auto"].output
    assert runs["auto"].losses == runs["never"].losses and len(runs["auto"].losses) == 10
