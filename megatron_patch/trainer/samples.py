"""Reads GPT-NeoX's token files as the same samples, in the same order, as GPT-NeoX does.

GPT-NeoX shuffles the documents of all epochs together, lays them end to end, cuts the stream into
pieces of `seq_length` tokens, each with one more token as its last label, and shuffles the pieces
(`megatron/data/gpt2_dataset.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_patch.architecture import SettingsError
from megatron_patch.indexed_dataset import IndexedDataset
from megatron_patch.neox.data_settings import split_weights
from megatron_patch.trainer.settings import TrainerSettings


class PackedSamples(Dataset):
    """Samples of packed documents: `input_ids` and `labels` (already shifted), int64 [seq_length].
    Raises a ValueError if the documents have no tokens.

    Args:
        dataset: the documents.
        documents: indices of the documents to use.
        seq_length: T.
        num_samples: smallest number of samples; the documents are repeated as often as it takes.
        seed: seed of both shuffles.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: np.ndarray,
        seq_length: int,
        num_samples: int,
        seed: int,
    ):
        self.dataset = dataset
        self.seq_length = seq_length
        tokens = int(dataset.sizes[documents].sum(dtype=np.int64))
        if not tokens:
            raise ValueError("no tokens in these documents")
        epochs = max(1, -(-(num_samples * seq_length + 1) // tokens))
        rng = np.random.RandomState(seed)
        self._documents = np.tile(documents.astype(np.int32), epochs)
        rng.shuffle(self._documents)
        self._ends = np.cumsum(dataset.sizes[self._documents], dtype=np.int64)
        self._order = np.arange((epochs * tokens - 1) // seq_length, dtype=np.uint32)
        rng.shuffle(self._order)

    def __len__(self) -> int:
        """Returns one less than there are, because GPT-NeoX's data set leaves out its last one."""
        return max(0, len(self._order) - 1)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = int(self._order[index]) * self.seq_length
        tokens = torch.from_numpy(self._stream(start, start + self.seq_length + 1))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}

    def _stream(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start` to `stop` of the documents laid end to end, int64."""
        pieces = []
        position = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            document = int(self._documents[position])
            end = int(self._ends[position])
            offset = start - (end - int(self.dataset.sizes[document]))
            piece = self.dataset.get(document, offset, offset + min(stop, end) - start)
            pieces.append(piece)
            start += len(piece)
            position += 1
        return np.concatenate(pieces).astype(np.int64)


class BlendedSamples(Dataset):
    """`num_samples` samples (or fewer where the data sets have fewer) of several data sets, mixed
    by weights of sum 1 (GPT-NeoX's `BlendableDataset`): the next one comes from the data set that
    is furthest below its weight."""

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[float], num_samples: int):
        self.parts = parts
        # GPT-NeoX divides by the sum a second time; the rounding decides between equal claims.
        weights = np.asarray(weights, dtype=np.float64)
        weights = weights / weights.sum()
        num_samples = min(num_samples, sum(len(part) for part in parts))
        self._part = np.empty(num_samples, dtype=np.int32)
        self._index = np.empty(num_samples, dtype=np.int64)
        taken = np.zeros(len(parts), dtype=np.int64)
        for sample in range(num_samples):
            part = int(np.argmax(weights * max(sample, 1) - taken))
            self._part[sample], self._index[sample] = part, taken[part]
            taken[part] += 1

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.parts[self._part[index]][int(self._index[index])]


class LoadedSamples(Dataset):
    """The `number` samples from `start` on in the order of GPT-NeoX's data loader, which drops an
    incomplete last batch and then starts again."""

    def __init__(self, samples: Dataset, batch: int, start: int, number: int):
        self.samples = samples
        self._whole = max(1, len(samples) // batch) * batch
        self._start, self._number = start, number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[(self._start + index) % self._whole]


def split_documents(split: str, count: int) -> list[np.ndarray]:
    """Returns the indices of the training, validation and test documents for GPT-NeoX's `split`.
    Raises a SettingsError like `split_weights`."""
    weights = split_weights(split)
    bounds = [0]
    for weight in weights:
        bounds.append(bounds[-1] + round(weight / sum(weights) * count))
    excess = bounds[-1] - count
    bounds = [0] + [bound - excess for bound in bounds[1:]]
    return [np.arange(max(a, 0), max(b, 0)) for a, b in zip(bounds, bounds[1:], strict=False)]


def build_samples(
    settings: TrainerSettings, world_size: int
) -> tuple[Dataset, Callable[[int], Dataset] | None]:
    """Returns the training samples, and a function that gives those of evaluation 0, 1, ..., or
    `None` where there is no validation. An evaluation starts where the one before it ended. Raises
    a SettingsError if a path holds no data set, or one without tokens."""
    micro, steps = settings.batch(world_size)
    batch = micro * steps * world_size
    train_number = settings.train_iters * batch
    evaluation = settings.eval_iters * batch
    valid_number = (settings.train_iters // settings.eval_interval + 1) * evaluation
    valid = None
    if settings.data_path:
        dataset = _open("data_path", settings.data_path)
        train_documents, valid_documents, _ = split_documents(settings.split, len(dataset))
        train = _samples("data_path", settings, dataset, train_documents, train_number)
        if evaluation and len(valid_documents):
            valid = _samples("data_path", settings, dataset, valid_documents, valid_number)
    else:
        train = _blend("train", settings, train_number)
        if evaluation and settings.valid_data_paths:
            valid = _blend("valid", settings, valid_number)

    def load(samples: Dataset, start: int, number: int) -> Dataset:
        return LoadedSamples(samples, micro * world_size, start, number)

    def validation(number: int) -> Dataset:
        return load(valid, number * evaluation, evaluation)

    return load(train, 0, train_number), None if valid is None else validation


def _blend(name: str, settings: TrainerSettings, number: int) -> Dataset:
    key = f"{name}_data_paths"
    paths = getattr(settings, key)
    weights = getattr(settings, f"{name}_data_weights") or [1.0] * len(paths)
    if not sum(weights) > 0:
        raise SettingsError(f"{name}_data_weights: found {weights}, wanted a positive sum")
    weights = [weight / sum(weights) for weight in weights]
    parts = []
    for path, weight in zip(paths, weights, strict=True):
        dataset = _open(key, path)
        # GPT-NeoX takes 0.5 % more, so that no part runs out.
        wanted = math.ceil(number * weight * 1.005)
        parts.append(_samples(key, settings, dataset, np.arange(len(dataset)), wanted))
    return BlendedSamples(parts, weights, number)


def _open(key: str, path: str) -> IndexedDataset:
    try:
        return IndexedDataset(path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{key}: {error}") from None


def _samples(
    key: str, settings: TrainerSettings, dataset: IndexedDataset, documents: np.ndarray, number: int
) -> PackedSamples:
    try:
        return PackedSamples(dataset, documents, settings.seq_length, number, settings.seed)
    except ValueError as error:
        raise SettingsError(f"{key}: {dataset.prefix}: {error}") from None
