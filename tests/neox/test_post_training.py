"""Fine-tuning on labelled documents, DPO, KTO and reward models: real trainings against the losses
that the exported Hugging Face models have on the same samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from convert import reshape_neox
from megatron_patch.hf import MetaLAForCausalLM
from megatron_patch.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from tests.conftest import VOCABULARY
from tests.neox.conversion import convert, export
from tests.neox.training import TRAINING, Run, settings, train, train_once

LENGTH, BATCH, STEPS = 48, 4, 4
PARTS = ("train", "valid", "test")
RUN = {
    "seq_length": LENGTH,
    "max_position_embeddings": LENGTH,
    "train_micro_batch_size_per_gpu": BATCH,
    "train_iters": STEPS,
    "lr_decay_iters": STEPS,
    "checkpoint_factor": 1,
    "init_method_std": 0.1,
    "data_path": None,
    "pack_impl": "unpacked",
    "warmup": 0.0,
    # Small steps: those of Adam amplify rounding, in which two ranks differ from one.
    "optimizer": {
        **TRAINING["optimizer"],
        "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8},
    },
    "min_lr": 3e-5,
}


def write(prefix: Path, documents: list[list[int]]) -> None:
    with IndexedDatasetWriter(prefix, VOCABULARY, lowest=-100) as writer:
        for document in documents:
            writer.add_document(document)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of data sets. Each document is a prompt, which has no labels, and an answer that
    counts up (`chosen`) or down (`rejected`) and ends with <|endoftext|>, 0. Labels of a reward
    model are in `end`. Some documents are longer than a sample."""
    folder, rng = tmp_path_factory.mktemp("post_training"), np.random.default_rng(0)
    sets: dict[str, list] = {}
    for _ in range(24):
        prompt = rng.integers(1, VOCABULARY, rng.integers(3, 12))
        for name, step in (("chosen", 1), ("rejected", -1)):
            answer = (prompt[-1] + step * np.arange(1, rng.integers(5, 45))) % VOCABULARY
            document = np.concatenate([prompt, answer, [0]])
            labels = np.where(np.arange(len(document)) < len(prompt), -100, document)
            ends = np.full(len(document), -100)
            ends[min(len(document), LENGTH) - 1] = 0
            for kind, values in (("", document), ("_label", labels), ("_end", ends)):
                sets.setdefault(name + kind, []).append(values)
    for name, documents in sets.items():
        write(folder / name, documents)
    for kind in ("", "_label"):
        documents = sets[f"chosen{kind}"][:12] + sets[f"rejected{kind}"][:12]
        write(folder / f"mixed{kind}", documents)
    write(folder / "mixed_reward", [[1]] * 12 + [[-1]] * 12)
    return folder


def paths(data: Path, sign: str, kind: str, name: str) -> dict:
    return {f"{sign}{part}{kind}_data_paths": [str(data / name)] for part in PARTS}


def labelled(data: Path) -> dict:
    return {**paths(data, "", "", "mixed"), **paths(data, "", "_label", "mixed_label")}


def pairs(data: Path, labels: str = "label") -> dict:
    found = {"dataset_impl": "pairwise"}
    for sign, name in (("pos_", "chosen"), ("neg_", "rejected")):
        found |= paths(data, sign, "", name)
        found |= paths(data, sign, "_label", f"{name}_{labels}")
    return found


BETA = 0.5


def objective(data: Path, base: Path, kind: str) -> dict:
    """The settings of a preference training that starts from the checkpoints `base`."""
    changes = {"train_impl": kind, "dpo_beta": BETA, "kto_beta": BETA}
    changes |= {"load": str(base), "finetune": True}
    if kind == "kto":
        return {**changes, **labelled(data), **paths(data, "", "_reward", "mixed_reward")}
    return {**changes, **pairs(data, "end" if kind == "rm" else "label")}


# ---- Samples

# The batches of each training, from one process.
READ = """
from megatron.data.data_utils import build_train_valid_test_data_loaders
answers = []
for changes in json.loads(%r):
    neox_args = NeoXArgs.from_dict({**settings, **changes})
    neox_args.configure_distributed_args()
    neox_args.build_tokenizer()
    loader = build_train_valid_test_data_loaders(neox_args)["train"]
    answers.append([{key: x.tolist() for key, x in batch.items()} for batch in loader])
answer(answers)
"""
PACKINGS = ("unpacked", "pack_until_overflow")


@pytest.fixture(scope="module")
def batches(in_neox, data, tokenizer_file) -> dict[str, list[dict]]:
    """The batches of trainings by `train_impl`, and of longer fine-tunings by `pack_impl`."""
    packed = {**labelled(data), "pack_impl": "packed"}
    trainings = {"packed": packed, "normal": labelled(data)}
    trainings |= {kind: objective(data, data, kind) for kind in ("dpo", "kto", "rm")}
    for packing in PACKINGS:
        trainings[packing] = {**labelled(data), "pack_impl": packing, "train_iters": 12}
    trainings["packed again"] = packed
    code = READ % json.dumps([{**RUN, **changes} for changes in trainings.values()])
    found = in_neox(settings(data / "mixed", tokenizer_file), code)
    return dict(zip(trainings, found, strict=True))


@pytest.mark.parametrize("packing", PACKINGS)
def test_padded_samples_hold_their_documents_and_no_more(batches, data, packing):
    documents, labels = (
        [document.tolist() for document in IndexedDataset(data / f"mixed{kind}")]
        for kind in ("", "_label")
    )
    seen = 0
    for batch in batches[packing]:
        for row, marks in zip(batch["text"], batch["label"], strict=True):
            assert len(row) == len(marks) == LENGTH + 1
            while len(row) > 3:
                fits = [i for i, d in enumerate(documents) if row[: len(d)] == d[: len(row)]]
                if not fits:
                    break
                (i,) = fits
                assert marks[: len(labels[i])] == labels[i][: len(marks)]
                length, seen = len(labels[i]), seen + 1
                row, marks = row[length:], marks[length:]
            assert set(row) <= {1} and set(marks) <= {-100}  # 0 would end a document
    assert seen >= 48


def test_padding_is_of_one_training_of_a_process(batches):
    assert batches["packed"] == batches["packed again"]


# ---- Trainings


@pytest.fixture(scope="module")
def base(neox_checkout, data, tokenizer_file, make_once) -> tuple[Run, Path]:
    """A fine-tuning on labelled documents, and the folder of its checkpoints. The other trainings
    start from it."""
    config = {**settings(data, tokenizer_file), **RUN, **labelled(data)}
    run, folder = train_once(make_once, "post-training-base", neox_checkout, config)
    return run, folder / "checkpoints"


@pytest.fixture(scope="module")
def exported(neox_checkout, tmp_path_factory) -> Callable[[Path, int], MetaLAForCausalLM]:
    """Function: the Hugging Face model of a checkpoint."""

    def load(checkpoints: Path, step: int) -> MetaLAForCausalLM:
        folder = tmp_path_factory.mktemp("hf") / "model"
        export(neox_checkout, checkpoints, folder, "--iteration", step)
        return MetaLAForCausalLM.from_pretrained(folder).eval()

    return load


def log_probabilities(
    model: MetaLAForCausalLM, batch: dict, text: str, label: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the labels of a batch, 0 where there is none: [b, s], and where there is one."""
    tokens, labels = (torch.tensor(batch[key]) for key in (text, label))
    with torch.no_grad():
        logp = model(tokens[:, :-1], use_cache=False).logits.log_softmax(-1)
    labels = labels[:, 1:]
    return logp.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0), labels >= 0


def test_fine_tuning_has_the_loss_of_its_labels(batches, base, exported):
    run, checkpoints = base
    for step in (1, 2):
        model, batch = exported(checkpoints, step - 1), batches["normal"][step - 1]
        logp, counts = log_probabilities(model, batch, "text", "label")
        assert run.losses[step] == pytest.approx((-logp.sum() / counts.sum()).item(), abs=1e-5)
    assert run.losses[STEPS] < run.losses[1]


@pytest.fixture(scope="module")
def trained(neox_checkout, data, tokenizer_file, base, make_once):
    """Function: a preference training from the fine-tuned model, and the folder of its
    checkpoints."""

    def run(kind: str, **changes) -> tuple[Run, Path]:
        config = {**settings(data, tokenizer_file), **RUN, **objective(data, base[1], kind)}
        name = "-".join(["post-training", kind, *changes])
        found, folder = train_once(make_once, name, neox_checkout, {**config, **changes})
        return found, folder / "checkpoints"

    return run


def dpo_loss(policy: MetaLAForCausalLM, reference: MetaLAForCausalLM | None, batch: dict):
    """arXiv 2305.18290, equation 7."""

    def margin(model: MetaLAForCausalLM) -> torch.Tensor:
        chosen, rejected = (
            log_probabilities(model, batch, sign, f"{sign}_label")[0].sum(1)
            for sign in ("pos", "neg")
        )
        return chosen - rejected

    ratio = margin(policy) - (0 if reference is None else margin(reference))
    return -F.logsigmoid(BETA * ratio).mean()


def kto_loss(policy: MetaLAForCausalLM, reference: MetaLAForCausalLM, batch: dict):
    """arXiv 2402.01306, equation 8, with the mean of the other half of the batch for the reference
    point z, and each sample's part of it at least 0, as in GPT-NeoX."""
    ratio = sum(
        sign * log_probabilities(model, batch, "text", "label")[0].sum(1)
        for sign, model in ((1, policy), (-1, reference))
    )
    reward = torch.tensor(batch["reward"])[:, 0]
    halves = ratio.chunk(2)
    z = torch.cat([half.clamp(min=0).mean().expand(len(half)) for half in halves[::-1]])
    return 0.5 * (1 - torch.sigmoid(BETA * reward * (ratio - z))).mean() * 2


LOSSES = {"dpo": dpo_loss, "kto": kto_loss}


@pytest.mark.parametrize("kind", LOSSES)
def test_preferences_have_the_loss_of_their_formula(batches, base, trained, exported, kind):
    run, checkpoints = trained(kind)
    reference = exported(base[1], STEPS)
    for step in (1, 2, STEPS):
        policy = exported(checkpoints, step - 1)
        loss = LOSSES[kind](policy, reference, batches[kind][step - 1])
        assert run.losses[step] == pytest.approx(loss.item(), abs=1e-5)
    last = exported(checkpoints, STEPS)
    # At first the model is the reference.
    losses = [LOSSES[kind](last, reference, batch) for batch in batches[kind]]
    assert np.mean(losses) < run.losses[1] - 0.1


# A batch through GPT-NeoX's own step in float64: the largest differences of the loss and of the
# gradients from those of the formula.
STEPS_ALONE = """
from functools import partial
from torch.nn.functional import logsigmoid
from megatron import training

answers = []
for changes in json.loads(%r):
    neox_args = NeoXArgs.from_dict({**settings, **changes})
    neox_args.configure_distributed_args()
    neox_args.build_tokenizer()
    kind, beta = neox_args.train_impl, neox_args.dpo_beta
    torch.manual_seed(0)
    model, reference = (training.get_model(neox_args).double() for _ in range(2))
    for one in (model, reference):
        one.set_batch_fn(partial(training.get_batch_sequential, neox_args=neox_args))
    text = torch.randint(2, 512, (8, 49))
    text[:, 30] = neox_args.tokenizer.eod
    labels = torch.where(torch.rand(8, 49) < 0.5, text, -100)
    if kind == "rm":
        labels = torch.full_like(text, -100).scatter(1, torch.randint(1, 49, (8, 1)), 7)
    rewards = torch.tensor([1.0, -1, 1, 1, -1, 1, -1, -1])
    padded = rewards[:, None] * (torch.arange(49) < 40)
    batch = {"text": text, "label": labels, "reward": padded}
    batch |= {f"{sign}{key}": value for i, sign in enumerate(("pos", "neg"))
              for key, value in (("", text.chunk(2)[i]), ("_label", labels.chunk(2)[i]))}
    loss, metrics = training.forward_step(
        iter([batch]), model, neox_args, None, is_train=True, reference_model=reference
    )
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    def outputs(one):
        batch = training._get_batch(neox_args, None, ["text"], {"text": text}, torch.int64)
        return one((batch[0], batch[4], batch[3]))

    counts = labels[:, 1:] >= 0

    def logp(one):
        logits = outputs(one).log_softmax(-1)
        return (logits.gather(2, text[:, 1:, None])[..., 0] * counts).sum(1)

    if kind == "rm":
        chosen, rejected = outputs(model)[..., 0][counts].chunk(2)
        wanted = -logsigmoid(chosen - rejected).mean()
    else:
        with torch.no_grad():
            known = logp(reference)
        ratio = logp(model) - known
        if kind == "dpo":
            chosen, rejected = ratio.chunk(2)
            wanted = -logsigmoid(beta * (chosen - rejected)).mean()
        else:
            z = [half.detach().clamp(min=0).mean().expand(4) for half in ratio.chunk(2)]
            wanted = (1 - torch.sigmoid(beta * rewards * (ratio - torch.cat(z[::-1])))).mean()
    wanted.backward()
    largest = max(p.grad.abs().max() for p in model.parameters())
    apart = max((p.grad - g).abs().max() for p, g in zip(model.parameters(), found))
    answers.append([(loss - wanted).abs().item(), (apart / largest).item(), largest.item()])

answer(answers)
"""
MODELS = {
    "metala": {},
    "documents": {"metala": {"reset_at_document": True}},
    "hybrid": {"attention_config": ["global", "metala"], "pos_emb": "rotary"},
    "tied": {"no_weight_tying": False},
}


CASES = [(kind, name) for kind in ("dpo", "kto", "rm") for name in MODELS]
CASES.remove(("rm", "tied"))


@pytest.fixture(scope="module")
def apart(in_neox, data, tokenizer_file) -> dict:
    """The answers of STEPS_ALONE for each of CASES, from one process."""
    every = {**RUN, "dpo_fp32": False, "kto_fp32": False}
    changes = [{**every, **objective(data, data, kind), **MODELS[name]} for kind, name in CASES]
    code = STEPS_ALONE % json.dumps(changes)
    found = in_neox(settings(data / "mixed", tokenizer_file), code)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_gradients_are_those_of_the_formula(apart, case):
    loss, gradients, largest = apart[case]
    assert loss < 1e-10 and gradients < 1e-10 and largest > 1e-3


def test_a_reward_model_wants_one_label_a_document(in_neox, data, tokenizer_file):
    """GPT-NeoX would take a second label of the first row for that of the second row. The rank that
    reads such a document says so, whichever it is."""
    code = """
    from megatron import training
    text = torch.ones(2, 49, dtype=torch.long)
    labels = torch.full_like(text, -100)
    labels[0, [7, 9]] = 1
    batch = {"pos": text, "neg": text, "pos_label": labels, "neg_label": labels}
    try:
        training.get_batch(neox_args, iter([batch]))
    except SystemExit as end:
        answer(end.code)
    """
    config = settings(data, tokenizer_file, **{**RUN, **objective(data, data, "rm")})
    found = in_neox(config, code)
    assert found.startswith("MetaLA: train_impl: found rm and documents with [2, 0, 2, 0] labels")


# ---- Layouts, going on, export


def test_a_reward_model_is_exported(neox_checkout, batches, trained, tmp_path):
    """Its head too, equal to GPT-NeoX's model; it has the loss of its training."""
    run, checkpoints = trained("rm")
    for step in (1, STEPS):
        folder = tmp_path / f"hf{step}"
        export(neox_checkout, checkpoints, folder, "--iteration", step - 1, "--verify")
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        rewards = []
        for sign in ("pos", "neg"):
            tokens = torch.tensor(batches["rm"][step - 1][sign])
            labels = torch.tensor(batches["rm"][step - 1][f"{sign}_label"])
            mask = torch.arange(LENGTH + 1) < (labels >= 0).int().argmax(1, keepdim=True)
            with torch.no_grad():
                rewards.append(model(tokens, attention_mask=mask.int()).logits[:, 0])
        loss = -F.logsigmoid(rewards[0] - rewards[1]).mean()
        assert run.losses[step] == pytest.approx(loss.item(), abs=1e-5)
    assert "reward model" in (folder / "README.md").read_text()


def reshape(checkout: Path, checkpoints: Path, step: int, output: Path) -> None:
    """Splits a checkpoint over two tensor-parallel ranks."""
    convert(
        reshape_neox, checkout,
        "--checkpoint", checkpoints, "--iteration", step, "--output", output,
        "--tensor-parallel", 2, "--pipeline-parallel", 0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["dpo", "kto", "rm"])
def test_two_tensor_parallel_ranks_train_alike(
    neox_checkout, data, tokenizer_file, base, trained, tmp_path, kind
):
    wanted, checkpoints = trained(kind)
    # The head of a reward model is new, so its first weights are taken from its own run.
    start = (checkpoints, 0) if kind == "rm" else (base[1], STEPS)
    reshape(neox_checkout, *start, tmp_path / "start")
    changes = {**RUN, **objective(data, tmp_path / "start", kind), "num_gpus": 2}
    run = train(neox_checkout, settings(data, tokenizer_file, tp=2, **changes), tmp_path)
    assert run.losses == pytest.approx(wanted.losses, abs=1e-5)
    assert run.validation_losses == pytest.approx(wanted.validation_losses, abs=1e-5)
    assert run.validation_losses


@pytest.mark.parametrize("stage", [1, 2])
def test_two_data_parallel_ranks_with_zero_train_alike(
    neox_checkout, data, tokenizer_file, base, trained, tmp_path, stage
):
    changes = {"num_gpus": 2, "train_micro_batch_size_per_gpu": BATCH // 2}
    changes |= {"zero_optimization": {"stage": stage}, **objective(data, base[1], "dpo")}
    run = train(neox_checkout, settings(data, tokenizer_file, **{**RUN, **changes}), tmp_path)
    assert run.losses == pytest.approx(trained("dpo")[0].losses, abs=1e-5)


def test_a_stopped_training_goes_on_with_the_first_reference(
    neox_checkout, data, tokenizer_file, base, trained, tmp_path
):
    config = settings(data, tokenizer_file, **{**RUN, **objective(data, base[1], "dpo")})
    config["save"] = str(tmp_path / "checkpoints")
    train(neox_checkout, {**config, "exit_interval": 2}, tmp_path / "first")
    run = train(neox_checkout, config, tmp_path / "second")
    wanted = trained("dpo")[0].losses
    assert run.losses == pytest.approx({step: wanted[step] for step in (3, STEPS)}, abs=1e-6)
