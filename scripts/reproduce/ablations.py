#!/usr/bin/env python3
"""What each part of MetaLA gives: small language models of equal size on equal tokens.

    full                MetaLA
    no_augmentation     without the self-augmentation term
    no_convolution      without the short convolution and its SiLU
    key_projection      with a key projection k = W_k x in place of k = 1 - decay
    softmax             softmax attention with rotary positions in all layers
    hybrid              each fourth layer softmax attention

The MLP is made wider or narrower until all have the parameters of "full". The paper has average
scores of 42.52 (full), 42.16 (no self-augmentation), 38.51 (no convolution) and 40.80 (key
projection restored) on commonsense tasks, at 0.4B; here the loss on held-out text is compared, in
nats a token, at the end of the text.

    --data FILE         its bytes are the tokens
    --data PREFIX       PREFIX.bin and PREFIX.idx, of scripts/prepare_data.py
    by default          the source of Python's standard library, which is always there

Usage: scripts/reproduce/run.sh ablations [--seed 0 1 2] [--minutes 8]

--tiny trains two layers on a little of it: the convolution matters.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from experiment import Experiment, Settings
from models import LanguageModel, Sizes, build
from torch import nn
from training import Recipe, Result, Run, cross_entropy, made_of, train

from megatron_patch.commands.command_line import CommandError, one_of, refuse, run_script
from megatron_patch.hf.layers_metala import MetaLATokenMixer
from megatron_patch.indexed_dataset import IndexedDataset, bin_path
from megatron_patch.ops.torch_ops import augment_norm_gate, decay_and_key, without_autocast

VARIANTS = (
    "full", "no_augmentation", "no_convolution", "key_projection", "softmax", "hybrid",
)  # fmt: skip
USUAL = dict(
    seed=[0, 1, 2], variant=list(VARIANTS), data=None, width=256, layers=8, heads=4, length=1024,
    batch=32, steps=2000, warm_up=200, lr=1e-3, bfloat16=True, test_sequences=128, most=50_000_000,
)  # fmt: skip
TINY = dict(
    seed=[0], variant=["full", "no_convolution"], width=64, layers=2, heads=2, length=128, batch=8,
    steps=120, warm_up=10, lr=5e-3, bfloat16=False, test_sequences=32, most=1_000_000,
)  # fmt: skip
HELD_OUT = 0.05  # of the text, its end
MARGIN = 0.1  # nats that --tiny shall show between the two
CHUNK_SIZE = 16


def recurrence_with_keys(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float
) -> torch.Tensor:
    """Returns o_t = scale S_t^T q_t, [B, T, H, V], of S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T.

    Gated linear attention in chunks (arXiv 2312.06635), for any keys: MetaLA's kernels compute
    their key from the decay. The state before a chunk is a sum over all earlier chunks, taken in
    one product. Keys are divided by the decay since their chunk began, which is finite as long as
    the log decays of a chunk sum to more than -80: with tau = 16, gate logits above -80.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].
        g: [B, T, H, K], log decays.
        scale: of the read-out.
    """
    tokens = q.shape[1]
    chunks = -(-tokens // CHUNK_SIZE)
    q, k, v, g = (  # [B, H, M chunks, C tokens, *]
        F.pad(x, (0, 0, 0, 0, 0, chunks * CHUNK_SIZE - tokens))
        .unflatten(1, (chunks, CHUNK_SIZE)).movedim(3, 1)
        for x in (q, k, v, g)
    )  # fmt: skip
    g = g.cumsum(-2)
    g_last = g[..., -1, :]
    qg = scale * q * g.exp()
    attention = (qg @ (k * (-g).exp()).mT).tril()
    added = (k * (g_last[..., None, :] - g).exp()).mT @ v  # to the state, [B, H, M, K, V]
    until = g_last.cumsum(-2)  # from the first token to a chunk's last, [B, H, M, K]
    between = (until - g_last)[..., :, None, :] - until[..., None, :, :]
    is_later = torch.ones(chunks, chunks, dtype=torch.bool, device=g.device).tril(-1)
    between = between.masked_fill(~is_later[..., None], -torch.inf).exp()
    h = torch.einsum("bhnmk,bhmkv->bhnkv", between, added)  # states before the chunks
    o = attention @ v + qg @ h
    return o.movedim(1, 3).flatten(1, 2)[:, :tokens]


class KeyProjectionMixer(MetaLATokenMixer):
    """MetaLA with a key projection. Its recurrence is PyTorch in float32."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.k_proj = nn.Linear(config.hidden_size, self.q_proj.out_features, bias=False)
        self.k_proj._is_query_or_gate = True

    def forward(self, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None]:
        x, _ = self.conv1d(x)
        parts = self.q_proj, self.k_proj, self.k_gate, self.v_proj
        out_gate = self._heads(self.g_proj(x))
        q, k, gate_logits, v = (self._heads(part(x).float()) for part in parts)
        return self._mix(q, k, gate_logits, v, out_gate), None, None

    def _mix(
        self, q: torch.Tensor, k: torch.Tensor, gate_logits: torch.Tensor, v: torch.Tensor,
        out_gate: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Maps [B, T, H, *] to the layer's output [B, T, D]."""
        with without_autocast(q.device):
            g, _ = decay_and_key(gate_logits, self.tau)
            o = recurrence_with_keys(q, k, v, g, self.scale)
            aug = self.aug_balance.view(self.num_heads, -1)
            out = augment_norm_gate(o, q, k, v, aug, out_gate, None, self.norm_eps)
        return self.out_proj(out.flatten(2))


class NoConvolution(nn.Module):
    """Stands for the short convolution: the input as it is."""

    def forward(self, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        return x, None


def new_model(case: Settings, vocabulary: int, mlp: int) -> LanguageModel:
    """Returns a variant whose MLPs are `mlp` wide."""
    variant = case["variant"]
    sizes = made_of(
        Sizes, case, vocabulary=vocabulary, kernel_size=4, expand_k=0.5, norm="simplermsnorm",
        self_augmentation=variant != "no_augmentation", mlp=mlp,
    )  # fmt: skip
    body = build(variant if variant in ("softmax", "hybrid") else "metala", sizes, norm_eps=1e-6)
    for layer in body.layers:
        if variant == "no_convolution":
            layer.token_mixer.conv1d = NoConvolution()
        elif variant == "key_projection":
            layer.token_mixer = KeyProjectionMixer(body.config)
            layer.token_mixer.apply(body._init_weights)
    return LanguageModel(body)


def equal_model(case: Settings, vocabulary: int) -> LanguageModel:
    """Returns a variant with as many parameters as "full", to eight columns of the MLPs."""
    mlp = case["width"] * 11 // 4
    with torch.device("meta"):
        wanted, found = (
            _count(new_model(case | {"variant": variant}, vocabulary, mlp))
            for variant in ("full", case["variant"])
        )
    columns = (wanted - found) / (3 * case["width"] * case["layers"])
    return new_model(case, vocabulary, mlp + 8 * round(columns / 8))


def _count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def read_tokens(source: str | None, most: int) -> torch.Tensor:
    """Returns at most `most` tokens of the data, int64."""
    if source is not None and not bin_path(source).exists():
        with open(source, "rb") as file:
            return _of_bytes(file.read(most))
    if source is not None:
        dataset = IndexedDataset(source)
        documents, count = [], 0
        for document in dataset:
            documents.append(document)
            count += len(document)
            if count >= most:
                break
        return torch.from_numpy(np.concatenate(documents).astype(np.int64))[:most]
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(folder.rglob("*.py")) if "site-packages" not in path.parts]
    text = bytearray()
    for path in files:
        text += path.read_bytes()
        if len(text) >= most:
            break
    return _of_bytes(bytes(text[:most]))


def _of_bytes(text: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))


def run_case(case: Settings, run: Run) -> Result:
    """Reads the text, and trains by the settings of a run."""
    tokens = read_tokens(case["data"], case["most"])
    length, batch, vocabulary = case["length"], case["batch"], max(256, int(tokens.max()) + 1)
    held_out = max(int(HELD_OUT * len(tokens)), length + 1)
    if len(tokens) < 2 * held_out:
        raise CommandError(f"{case['data']}: found {len(tokens)} tokens, wanted {2 * held_out}")
    training, test = tokens[:-held_out].to(run.device), tokens[-held_out:].to(run.device)
    window = torch.arange(length + 1, device=run.device)
    torch.manual_seed(case["seed"])
    model = equal_model(case, vocabulary)
    generator = torch.Generator(run.device)
    recipe = made_of(
        Recipe, case, decay=0.1, part=max(1, case["steps"] // 20), lowest=case["lr"] / 10
    )

    def batch_at(step: int) -> torch.Tensor:
        """Returns the same sequences for all variants."""
        generator.manual_seed(case["seed"] * case["steps"] + step)
        last = len(training) - length
        starts = torch.randint(last, (batch, 1), generator=generator, device=run.device)
        return training[starts + window]

    def loss_of(sequences: torch.Tensor) -> torch.Tensor:
        with recipe.autocast(run.device):
            logits = model(sequences[:, :-1])
        return cross_entropy(logits, sequences[:, 1:])

    starts = torch.linspace(0, len(test) - length - 1, case["test_sequences"], device=run.device)
    sequences = test[starts.long()[:, None] + window]

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        total = sum(loss_of(part).item() * len(part) for part in sequences.split(batch))
        model.train()
        return total / len(sequences)

    return train(model, loss_of, batch_at, recipe, run, evaluate, measure="loss")


def source_of_data(text: str) -> str:
    """Argument type: a file, or the prefix of a prepared pair."""
    if not (Path(text).is_file() or bin_path(text).is_file()):
        refuse(f"no file {text} and no {text}.bin", "one of them")
    return text


EXPERIMENT = Experiment(
    "ablations", USUAL, TINY, ("seed", "variant"), run_case, measure="loss",
    effect=(lambda found: found["full"] < found["no_convolution"] - MARGIN,
            f"a loss lower by {MARGIN} with the convolution"),
    kinds={"variant": one_of(VARIANTS), "data": source_of_data},
)  # fmt: skip

if __name__ == "__main__":
    run_script(EXPERIMENT.main)
