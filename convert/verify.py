"""Proof that an exported folder is the model that was trained: GPT-NeoX's own layers and the
Hugging Face model, run on the same tokens.

The GPT-NeoX side shares nothing with the converter's merging. One process for each tensor-parallel
rank builds the tensor-parallel model and loads its own rank's files, as in training; the stages of
a pipeline run in one process, and DeepSpeed's own code joins the pieces of ZeRO stage 3. Both sides
compute in float32 on the CPU whatever the weights' dtype is, so that a conversion which keeps the
dtype must agree to float32's accuracy.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from convert.command import ConvertError
from convert.gpt_neox import ROOT
from convert.neox_checkpoint import NeoXCheckpoint

BATCH, LENGTH = 2, 160  # more than two chunks of the operator, and a rest
# Largest difference allowed where all weights were written as they are: TOLERANCE. Deep models
# amplify rounding beyond that (a new one of 0.38B moves by 2e-4 when the last bits of its embedding
# change), so it is at least TIMES_ROUNDING times what the last bits do to this very model, but no
# more than a share of the largest logit; wrong weights move the logits by far more.
TOLERANCE = 1e-4
TIMES_ROUNDING, ROUNDING_SHARE = 4, 1e-2
# Weights rounded to a smaller dtype move the logits by more: this share of the largest.
SHARE_OF_LARGEST_LOGIT = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Comparison:
    """Result of a verification."""

    largest_difference: float
    tolerance: float
    largest_logit: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest_difference:.2e} "
            f"(allowed {self.tolerance:.1e}, largest logit {self.largest_logit:.2f}, "
            f"{self.tokens} tokens)"
        )

    @property
    def is_equal(self) -> bool:
        return self.largest_difference <= self.tolerance  # False for NaN


def verify(
    neox: Path,
    source: NeoXCheckpoint,
    folder: Path,
    tokens: int,
    rounded_to: torch.dtype | None,
) -> Comparison:
    """Compares a folder with the checkpoint it was made from.

    Args:
        neox: the GPT-NeoX checkout, linked to the plugin or not.
        source: the checkpoint; only its settings and where its files are is used.
        folder: the Hugging Face folder.
        tokens: number of tokens of the tokenizer.
        rounded_to: the dtype that weights were rounded to, `None` if they were written as they are.

    Raises:
        ConvertError: the two differ, or one of them cannot be run.
    """
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(tokens, (BATCH, LENGTH), generator=generator)
    with tempfile.TemporaryDirectory(prefix="verify-") as work:
        expected = _neox_logits(neox, source, token_ids, Path(work))
    found, rounding = _hf_logits(folder, token_ids)
    comparison = compare(expected[..., : found.shape[-1]], found, rounding, rounded_to)
    if not comparison.is_equal:
        raise ConvertError(f"not equal to the GPT-NeoX model: {comparison}")
    return comparison


def compare(
    expected: torch.Tensor, found: torch.Tensor, rounding: float, rounded_to: torch.dtype | None
) -> Comparison:
    """The largest difference between two models' logits, [batch, time, vocabulary].

    Args:
        expected, found: the logits.
        rounding: how far the last bit of the embedding moves them.
        rounded_to: see `verify`.
    """
    largest = expected.abs().max().item()
    return Comparison(
        largest_difference=(expected - found).abs().max().item(),
        tolerance=max(
            TOLERANCE,
            min(TIMES_ROUNDING * rounding, ROUNDING_SHARE * largest),
            SHARE_OF_LARGEST_LOGIT.get(rounded_to, 0.0) * largest,
        ),
        largest_logit=largest,
        tokens=expected.shape[0] * expected.shape[1],
    )


def _hf_logits(folder: Path, token_ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits of the Hugging Face model, and how far the last bit of its embedding moves them."""
    from megatron_patch.hf import MetaLAForCausalLM

    model, loading = MetaLAForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {key: sorted(names) for key, names in loading.items() if names}
    if wrong:
        raise ConvertError(f"{folder}: does not fit the Hugging Face model: {wrong}")
    with torch.no_grad():
        model = model.float().eval()
        logits = model(token_ids, use_cache=False).logits
        embedding = model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        up_or_down = torch.randint(2, embedding.shape, generator=generator) * 2 - 1
        embedding.mul_(1 + up_or_down * torch.finfo(torch.float32).eps)
        moved = model(token_ids, use_cache=False).logits
    return logits, (moved - logits).abs().max().item()


def _neox_logits(
    neox: Path, source: NeoXCheckpoint, token_ids: torch.Tensor, work: Path
) -> torch.Tensor:
    """Logits [batch, time, padded vocabulary] of the tensor-parallel GPT-NeoX model."""
    ranks = source.tensor_parallel
    torch.save(token_ids, work / "tokens.pt")
    job = {
        "settings": source.settings,
        "step": str(source.step.resolve()),
        "form": source.form,
        "ranks": ranks,
    }
    (work / "job.json").write_text(json.dumps(job, default=str))
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(neox), str(ROOT), inherited])),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "WANDB_MODE": "disabled",
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    processes, logs = [], []
    try:
        for rank in range(ranks):
            logs.append((work / f"rank{rank}.log").open("w+"))
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "convert.neox_logits", str(work)],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=work,
                    stdout=logs[-1],
                    stderr=subprocess.STDOUT,
                )
            )
        failed = _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    if failed is not None:
        logs[failed].seek(0)
        lines = logs[failed].read().strip().splitlines()
        print("\n".join(lines[-30:]), file=sys.stderr)
        reason = re.sub(r"\x1b\[\d*m|\[rank\d+\]: ", "", lines[-1]) if lines else "no output"
        raise ConvertError(
            f"the GPT-NeoX model of rank {failed} cannot be run: "
            f"exit code {processes[failed].returncode}, {reason}"
        )
    for log in logs:
        log.close()
    return torch.load(work / "logits.pt", weights_only=True)


def _wait(processes: list[subprocess.Popen]) -> int | None:
    """Waits for all, or until one fails, whose index it returns: the others would wait for it."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [i for i, code in enumerate(codes) if code]
        if failed:
            return failed[0]
        if None not in codes:
            return None
        time.sleep(0.05)
