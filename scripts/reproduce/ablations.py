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

Usage: scripts/reproduce/run.sh ablations [--seeds 0 1 2] [--picture loss.png] [--minutes 8]

--tiny trains two layers on a little of it: the convolution matters.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import Sizes, metala_config
from steps import Schedule, train_steps
from torch import nn
from training import (
    add_run_arguments,
    cross_entropy,
    sweep,
    take_run_arguments,
    title_of,
)

from megatron_patch.commands.command_line import (
    CommandError,
    Parser,
    number,
    one_of,
    picture,
    run_script,
    whole,
)
from megatron_patch.hf import MetaLAForCausalLM
from megatron_patch.hf.layers_metala import MetaLATokenMixer
from megatron_patch.indexed_dataset import IndexedDataset, bin_path
from megatron_patch.ops.torch_ops import (
    augment_norm_gate,
    chunk_fwd,
    decay_and_key,
    without_autocast,
)

VARIANTS = (
    "full", "no_augmentation", "no_convolution", "key_projection", "softmax", "hybrid",
)  # fmt: skip
DEFAULT = dict(
    variant=list(VARIANTS), width=256, layers=8, heads=4, length=1024, batch=32, steps=2000,
    warm_up=200, lr=1e-3, bfloat16=True, test_sequences=128, most=50_000_000, seeds=[0, 1, 2],
)  # fmt: skip
TINY = dict(
    variant=["full", "no_convolution"], width=64, layers=2, heads=2, length=128, batch=8,
    steps=120, warm_up=10, lr=5e-3, bfloat16=False, test_sequences=32, most=1_000_000, seeds=[0],
)  # fmt: skip
HELD_OUT = 0.05  # of the text, its end
MARGIN = 0.1  # nats that --tiny shall show between the two


class KeyProjectionMixer(MetaLATokenMixer):
    """MetaLA with a key projection. Its recurrence is chunked PyTorch in float32, because the
    kernels compute the key themselves."""

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
            o, _ = chunk_fwd(q, k, v, g, self.scale, None, False, None)
            aug = self.aug_balance.view(self.num_heads, -1)
            out = augment_norm_gate(o, q, k, v, aug, out_gate, None, self.norm_eps)
        return self.out_proj(out.flatten(2))


class NoConvolution(nn.Module):
    """Stands for the short convolution: the input as it is."""

    def forward(self, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        return x, None


def new_model(case: dict[str, Any], vocabulary: int, mlp: int) -> MetaLAForCausalLM:
    """Returns a variant whose MLPs are `mlp` wide."""
    variant = case["variant"]
    sizes = Sizes(
        vocabulary, case["width"], case["layers"], case["heads"], 4, expand_k=0.5,
        self_augmentation=variant != "no_augmentation", norm="simplermsnorm",
    )  # fmt: skip
    kind = variant if variant in ("softmax", "hybrid") else "metala"
    model = MetaLAForCausalLM(metala_config(kind, sizes, intermediate_size=mlp, norm_eps=1e-6))
    for layer in model.model.layers:
        if variant == "no_convolution":
            layer.token_mixer.conv1d = NoConvolution()
        elif variant == "key_projection":
            layer.token_mixer = KeyProjectionMixer(model.config)
            layer.token_mixer.apply(model._init_weights)
    return model


def build(case: dict[str, Any], vocabulary: int) -> MetaLAForCausalLM:
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


def run_case(device: torch.device, case: dict[str, Any], until: float) -> dict[str, Any]:
    """Trains by the settings that `main` makes."""
    tokens = read_tokens(case["data"], case["most"])
    length, vocabulary = case["length"], max(256, int(tokens.max()) + 1)
    held_out = max(int(HELD_OUT * len(tokens)), length + 1)
    if len(tokens) < 2 * held_out:
        raise CommandError(f"{case['data']}: found {len(tokens)} tokens, wanted {2 * held_out}")
    training, test = tokens[:-held_out].to(device), tokens[-held_out:].to(device)
    window = torch.arange(length + 1, device=device)
    torch.manual_seed(case["seed"])
    model = build(case, vocabulary).to(device)
    # The same batches for all variants.
    generator = torch.Generator(device).manual_seed(case["seed"])

    def batch_at(step: int) -> torch.Tensor:
        last = len(training) - length
        starts = torch.randint(last, (case["batch"], 1), generator=generator, device=device)
        return training[starts + window]

    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(
            device.type, torch.bfloat16, enabled=case["bfloat16"], cache_enabled=False
        ):
            return model(input_ids=tokens[:, :-1]).logits

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits_of(tokens), tokens[:, 1:])

    starts = torch.linspace(0, len(test) - length - 1, case["test_sequences"], device=device)
    sequences = test[starts.long()[:, None] + window]

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        parts = sequences.split(case["batch"])
        total = sum(loss_of(part).item() * len(part) for part in parts)
        model.train()
        return total / len(sequences)

    found = train_steps(
        model, loss_of, batch_at, Schedule(case["lr"], case["steps"], case["warm_up"]), device,
        until, title_of(case, ("variant", "seed")), evaluate,
    )  # fmt: skip
    return {"loss": found["validation"][-1] if found["validation"] else None, **found}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = number(lambda value: value > 0, "above 0")
    parser.add_argument("--variant", type=one_of(VARIANTS), nargs="+", help=", ".join(VARIANTS))
    parser.add_argument("--seeds", type=whole(0), nargs="+", metavar="N")
    parser.add_argument("--data", metavar="FILE", help="text, or the prefix of a prepared pair")
    parser.add_argument("--lr", type=positive, metavar="RATE")
    for name in ("width", "layers", "heads", "length", "batch", "steps", "warm-up"):
        parser.add_argument(f"--{name}", type=whole(1), metavar="N")
    parser.add_argument("--most", type=whole(1), metavar="N", help="tokens that are read at most")
    parser.add_argument("--test-sequences", type=whole(1), metavar="N")
    parser.add_argument("--picture", type=picture, metavar="FILE", help="of the loss curves")
    add_run_arguments(parser)
    args = vars(parser.parse_args())
    tiny, file, device, limits = take_run_arguments(args, "ablations")
    output = args.pop("picture")
    given = {name: value for name, value in args.items() if value is not None}
    settings = {"data": None, **(TINY if tiny else DEFAULT), **given}
    data = settings["data"]
    if data is not None and not (Path(data).is_file() or bin_path(data).is_file()):
        parser.error(f"--data: found no file {data} and no {data}.bin, wanted one of them")
    variants, seeds = settings.pop("variant"), settings.pop("seeds")
    cases = [dict(variant=name, seed=seed, **settings) for seed in seeds for name in variants]
    runs = sweep(file, cases, functools.partial(run_case, device), **limits)
    print_table(runs)
    if output is not None:
        draw(runs, output)
    if tiny and not given:
        report_effect(runs)
    print(file)


def by_variant(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the runs of each variant that did not diverge."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if not run.get("diverged"):
            found.setdefault(run["settings"]["variant"], []).append(run)
    return found


def print_table(runs: list[dict[str, Any]]) -> None:
    """Prints the mean and the spread of each variant's loss."""
    for variant, group in by_variant(runs).items():
        losses = [run["loss"] for run in group]
        spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        print(f"{variant:16} {statistics.mean(losses):.4f}{spread} ({group[0]['parameters']:,})")


def draw(runs: list[dict[str, Any]], output: Path) -> None:
    """Writes a picture of the validation loss, averaged over seeds."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for variant, group in by_variant(runs).items():
        mean = [
            statistics.mean(losses)
            for losses in zip(*(run["validation"] for run in group), strict=False)
        ]
        axes.plot(group[0]["at"][: len(mean)], mean, label=variant)
    axes.set(xlabel="steps", ylabel="validation loss (nats a token)")
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


def report_effect(runs: list[dict[str, Any]]) -> None:
    """Prints what the convolution changes. Raises a CommandError if it is not plain to see."""
    found = {run["settings"]["variant"]: run["loss"] for run in runs}
    told = f"loss {found['full']} with the convolution, {found['no_convolution']} without"
    if not found["full"] < found["no_convolution"] - MARGIN:
        raise CommandError(f"{told}: wanted {MARGIN} between them")
    print(f"Ablations: {told}.")


if __name__ == "__main__":
    run_script(main)
