"""The table of docs/parallelism.md: every combination of parallel settings that four ranks allow.

A combination is a dictionary of settings. Each runs three steps in real GPT-NeoX processes on the
CPU, from the same weights and on the same samples as one rank without any of the settings. Losses
and gradient norms are compared with that rank's.

    python -m tests.neox.parallelism_table --results /tmp/results.jsonl

runs what `--results` does not hold yet, and writes the table. A combination that fails, or whose
numbers differ, stands in the table as FAILED, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from convert.reshape_neox import reshape_neox
from megatron_patch.indexed_dataset import IndexedDatasetWriter
from tests.neox.process import NeoXProcess
from tests.neox.training import neox, settings

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"
BEGIN, END = "<!-- table: written by tests/neox/parallelism_table.py -->", "<!-- end of table -->"
RANKS, STEPS, BATCH, LAYERS = 4, 3, 4, 4
ZERO_STAGES = (0, 1, 2, 3)
CONTEXT, SEQUENCE, DOCUMENTS = (1, 2, 4), (False, True), (False, True)
# Differences that rounding in float32 explains: of the loss, and of the norm relative to itself.
LOSS_TOLERANCE, NORM_TOLERANCE = 3e-6, 1e-6

# The stock train.py, which also writes each step's loss and squared norms of the rank's gradients,
# by name, before they are clipped. Pipeline stages and tensor-parallel ranks hold different ones.
TRAIN = """
import json, os, sys
sys.path.insert(0, os.getcwd())
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad
from megatron import training
from megatron.neox_arguments import NeoXArgs

steps, take_step, train_step = [], DeepSpeedEngine._take_model_step, training.train_step

def take_and_note(self, *args, **kwargs):
    norms = {}
    for name, p in self.module.named_parameters():
        gradient = safe_get_full_grad(p) if p.grad is None or hasattr(p, "ds_id") else p.grad
        gradient = gradient.double()
        norms[name] = [gradient.square().sum().item(), gradient.sum().item()]
    steps.append([norms])
    take_step(self, *args, **kwargs)

def train_and_note(*args, **kwargs):
    losses, skipped = train_step(*args, **kwargs)
    steps[-1].append(float(losses["lm_loss"]))
    return losses, skipped

DeepSpeedEngine._take_model_step, training.train_step = take_and_note, train_and_note
neox_args = NeoXArgs.consume_neox_args()
neox_args.configure_distributed_args()
neox_args.build_tokenizer()
training.pretrain(neox_args=neox_args)
with open(os.path.join(os.environ["NORMS"], os.environ["RANK"]), "w") as file:
    json.dump(steps, file)
"""


@dataclass(frozen=True)
class Combination:
    """Numbers of ranks (`pipeline` is 0 for a plain model), and what else is on."""

    tensor: int = 1
    pipeline: int = 0
    data: int = 1
    context: int = 1
    sequence: bool = False
    zero: int = 0
    recompute: bool = False
    documents: bool = False
    hybrid: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * max(self.pipeline, 1) * self.data * self.context

    @property
    def baseline(self) -> Combination:
        """The combination on one rank that this one must equal."""
        return Combination(documents=self.documents, hybrid=self.hybrid)

    def settings(self) -> dict:
        """The settings of a run, without those of its files. What is off is not mentioned, so that
        a version without the feature takes them too."""
        metala = {
            "init": "authors",
            **({"context_parallel_size": self.context} if self.context > 1 else {}),
            **({"reset_at_document": True} if self.documents else {}),
        }
        kinds = ["metala", "metala", "global", "metala"] if self.hybrid else ["metala"] * LAYERS
        samples = 2 if self.data == 1 else 1  # of a micro-batch
        return {
            "num_layers": LAYERS,
            "attention_config": kinds,
            "norm": "rmsnorm",
            "metala": metala,
            "model_parallel_size": self.tensor,
            "pipe_parallel_size": self.pipeline,
            "num_gpus": self.ranks,
            "train_micro_batch_size_per_gpu": samples,
            "gradient_accumulation_steps": BATCH // (self.data * samples),
            "zero_optimization": {"stage": self.zero},
            **({"sequence_parallel": True} if self.sequence else {}),
            **({"checkpoint_activations": True} if self.recompute else {}),
        }


LAYOUT = [field.name for field in fields(Combination)][:5]  # what a row of the table is


def combinations() -> Iterator[Combination]:
    """Yields every combination of at most `RANKS` ranks, in powers of two, of the settings that the
    table covers."""
    switch = (False, True)
    sizes = [n for n in (1, 2, 4) if n <= RANKS]
    layouts = product(sizes, (0, *sizes), sizes, CONTEXT, SEQUENCE)
    for documents, layout in product(DOCUMENTS, layouts):
        if Combination(*layout).ranks > RANKS or (layout[4] and layout[0] == 1):
            continue
        for zero, recompute, hybrid in product(ZERO_STAGES, switch, switch):
            yield Combination(*layout, zero, recompute, documents, hybrid)


@dataclass(frozen=True)
class Outcome:
    """What came of a combination: `passed` with its largest differences of loss and norm, `refused`
    with the line, or `FAILED` with what went wrong."""

    kind: str
    loss: float = 0.0
    norm: float = 0.0
    line: str = ""


class Bench:
    """Runs combinations in a linked checkout; everything is written to `folder`."""

    def __init__(self, checkout: Path, tokenizer: Path, folder: Path):
        self.checkout, self.tokenizer, self.folder = checkout, tokenizer, folder
        self.data = folder / "documents"
        (folder / "train.py").write_text(TRAIN)
        rng = np.random.default_rng(0)
        with IndexedDatasetWriter(self.data, vocab_size=512) as writer:
            for _ in range(600):  # several documents a sample, each ended by token 0
                steps = rng.choice([1, 2], p=[0.9, 0.1], size=rng.integers(5, 60))
                tokens = (rng.integers(512) + np.cumsum(steps)) % 511 + 1
                writer.add_document(np.append(tokens, 0))
        self._baseline = cache(self._run_baseline)
        self._weights = cache(self._reshaped)

    def refusals(self, chosen: Iterable[Combination]) -> dict[Combination, str]:
        """Returns the line of each combination that the settings' checks refuse, all by one
        process."""
        chosen = list(chosen)
        code = """
        import contextlib, io
        from megatron_patch.architecture import SettingsError
        answers = []
        for changes in json.load(open(%r)):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    NeoXArgs.from_dict({**settings, **changes})
                answers.append("")
            except SettingsError as error:
                answers.append(str(error))
        answer(answers)
        """
        changes = [{**c.settings(), "global_num_gpus": c.ranks} for c in chosen]
        start = {**self._files(), **Combination().settings()}
        process = NeoXProcess(self.checkout, self.folder)
        asked = self.folder / "asked.json"  # too long for a command line
        asked.write_text(json.dumps(changes))
        lines = process(start, code % str(asked))
        return {c: line for c, line in zip(chosen, lines, strict=True) if line}

    def outcome(self, combination: Combination) -> Outcome:
        """Runs one combination that the checks accept."""
        steps, line = self.run(combination)
        if steps is None:
            kind = "refused" if line.startswith("MetaLA: ") else "FAILED"
            return Outcome(kind, line=line.removeprefix("MetaLA: "))
        wanted = self._baseline(combination.baseline)
        loss = max(abs(a[0] - b[0]) for a, b in zip(steps, wanted, strict=True))
        norm = max(abs(a[1] - b[1]) / b[1] for a, b in zip(steps, wanted, strict=True))
        is_equal = loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE
        return Outcome("passed" if is_equal else "FAILED", loss, norm)

    def _files(self) -> dict:
        return settings(
            self.data,
            self.tokenizer,
            train_iters=STEPS,
            eval_iters=0,
            lr_decay_iters=10,
            warmup=0.0,
            gradient_clipping=0.5,  # below the norms, so that a wrong norm shows in the next loss
            # With a small epsilon, Adam's first steps have the sign of gradients that are rounding.
            optimizer={
                "type": "cpu_torch_adam",
                "params": {"lr": 1.0e-2, "betas": [0.9, 0.95], "eps": 1.0e-3},
            },
        )

    def _run_baseline(self, baseline: Combination) -> list[tuple[float, float]]:
        steps, line = self.run(baseline, save_first=True)
        assert steps is not None, line
        return steps

    def _reshaped(self, hybrid: bool, tensor: int, pipeline: int) -> Path:
        """Returns the baseline's weights before its first step, in another layout."""
        self._baseline(Combination(hybrid=hybrid))
        folder = self._folder(Combination(hybrid=hybrid))
        output = self.folder / f"weights-{hybrid}-{tensor}-{pipeline}"
        reshape_neox(folder / "checkpoints", output, tensor, pipeline, 0)
        return output

    def _folder(self, combination: Combination) -> Path:
        return self.folder / "-".join(str(int(value)) for value in astuple(combination))

    def run(
        self, combination: Combination, save_first: bool = False, **changes
    ) -> tuple[list[tuple[float, float]] | None, str]:
        """Returns (loss, norm of the gradients) of each step; without them, a line that says
        why. `changes` are further settings."""
        folder = self._folder(combination)
        config = {**self._files(), **combination.settings(), **changes}
        if save_first:
            config |= {"save": str(folder / "checkpoints"), "extra_save_iters": [0]}
        elif combination.zero != 3:  # which loads only its own files, and starts with the same
            key = (combination.hybrid, combination.tensor, combination.pipeline)
            config |= {"load": str(self._weights(*key)), "finetune": True}
        norms = folder / "norms"
        norms.mkdir(parents=True, exist_ok=True)
        try:
            run = neox(
                self.checkout, str(self.folder / "train.py"), config, folder, NORMS=str(norms)
            )
        except subprocess.TimeoutExpired:
            return None, "no end after ten minutes"
        if run.returncode:
            said = [line for line in run.output.splitlines() if line.startswith("MetaLA: ")]
            lines = [line for line in run.output.splitlines() if line.strip()]
            is_refusal = said and "Traceback" not in run.output
            return None, said[-1] if is_refusal else (lines or ["no output"])[-1]
        ranks = [json.loads(file.read_text()) for file in norms.iterdir()]
        return [_step(of_ranks) for of_ranks in zip(*ranks, strict=True)], ""


def _step(of_ranks: tuple) -> tuple[float, float]:
    """Returns the loss of a step and the norm of all ranks' gradients. Those of one name and equal
    numbers are of one parameter that ranks hold in common."""
    parts = {(name, *numbers) for norms, _ in of_ranks for name, numbers in norms.items()}
    losses = {loss for _, loss in of_ranks}
    return sum(losses) / len(losses), sum(part[1] for part in parts) ** 0.5


# ---- The text


def render(outcomes: dict[Combination, Outcome]) -> str:
    """Returns the tables. A cell is of four combinations: with and without recomputation, MetaLA
    layers alone and a hybrid."""
    letters: dict[str, str] = {}  # by the refusal without its numbers
    examples: dict[str, str] = {}
    for outcome in outcomes.values():
        if outcome.kind == "refused":
            letter = letters.setdefault(_pattern(outcome.line), _letter(len(letters)))
            examples.setdefault(letter, outcome.line)

    def word(outcome: Outcome) -> str:
        if outcome.kind == "passed":
            return f"{outcome.loss:.0e} / {outcome.norm:.0e}"
        if outcome.kind == "refused":
            return letters[_pattern(outcome.line)]
        return f"**FAILED** {outcome.line or f'{outcome.loss:.0e} / {outcome.norm:.0e}'}"

    def one_word(found: Sequence[Outcome]) -> str | None:
        if all(outcome.kind == "passed" for outcome in found):
            worst = [max(getattr(o, name) for o in found) for name in ("loss", "norm")]
            return word(Outcome("passed", *worst))
        words = {word(outcome) for outcome in found}
        return words.pop() if len(words) == 1 else None

    def cell(found: dict[Combination, Outcome]) -> str:
        if (whole := one_word([*found.values()])) is not None:
            return whole
        halves = [
            one_word([o for c, o in found.items() if c.hybrid == hybrid])
            for hybrid in (False, True)
        ]
        if None not in halves:
            return "; hybrid ".join(halves)
        return "; ".join(
            f"{_kind(c)}: {word(o)}" for c, o in sorted(found.items(), key=lambda i: astuple(i[0]))
        )

    lines = [_summary(outcomes)]
    for documents in (False, True):
        title = "With `metala: {reset_at_document: true}`" if documents else "Without documents"
        lines += ["", f"{title}:", ""]
        header = [*LAYOUT, *(f"ZeRO {stage}" for stage in ZERO_STAGES)]
        lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for layout in sorted({_layout(c) for c in outcomes if c.documents == documents}):
            row = {c: o for c, o in outcomes.items() if _layout(c) == layout}
            cells = [
                cell({c: o for c, o in row.items() if (c.zero, c.documents) == (zero, documents)})
                for zero in ZERO_STAGES
            ]
            names = [("yes" if v else "–") if isinstance(v, bool) else str(v) for v in layout]
            lines.append("| " + " | ".join([*names, *cells]) + " |")
    if examples:
        lines += ["", "Refused at the start, each in one line:", ""]
        lines += [f"- **{letter}**: `{line}`" for letter, line in examples.items()]
    return "\n".join(lines)


def _summary(outcomes: dict[Combination, Outcome]) -> str:
    counts = {
        kind: sum(outcome.kind == kind for outcome in outcomes.values())
        for kind in ("passed", "refused", "FAILED")
    }
    worst = [
        max((getattr(o, n) for o in outcomes.values() if o.kind == "passed"), default=0.0)
        for n in ("loss", "norm")
    ]
    return (
        f"{len(outcomes)} combinations: {counts['passed']} passed, {counts['refused']} refused, "
        f"{counts['FAILED']} failed. Largest differences: {worst[0]:.1e} of the loss, "
        f"{worst[1]:.1e} of the gradient norm."
    )


def _layout(combination: Combination) -> tuple:
    return astuple(combination)[: len(LAYOUT)]


def _kind(combination: Combination) -> str:
    words = "hybrid" if combination.hybrid else "MetaLA"
    return f"{words}, recomputed" if combination.recompute else words


def _pattern(line: str) -> str:
    return re.sub(r"\d+", "N", line)


def _letter(index: int) -> str:
    return chr(ord("a") + index)


def written(text: str) -> tuple[str, str, str]:
    """Returns the page before the table, the table, and the page after it. Raises a ValueError if a
    marker is missing."""
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    return before, table.strip(), after


def cells(table: str) -> dict[tuple, list[str]]:
    """Returns the four cells of each row by (documents, layout)."""
    found: dict[tuple, list[str]] = {}
    documents = False
    for line in table.splitlines():
        documents |= line.startswith("With `metala")
        values = [value.strip() for value in line.strip("|").split("|")]
        if len(values) == len(LAYOUT) + len(ZERO_STAGES) and values[0].isdigit():
            numbers = tuple(map(int, values[:4]))
            found[(documents, *numbers, values[4] == "yes")] = values[5:]
    return found


# ---- The command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="kept between runs")
    parser.add_argument("--jobs", type=int, default=3, help="combinations at a time")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        outcomes = run_all(Path(name), given.results, given.jobs)
    before, _, after = written(PAGE.read_text())
    PAGE.write_text(f"{before}{BEGIN}\n{render(outcomes)}\n{END}{after}")
    failed = [c for c, outcome in outcomes.items() if outcome.kind == "FAILED"]
    for combination in failed:
        print(f"FAILED: {combination}: {outcomes[combination]}", file=sys.stderr)
    sys.exit(bool(failed))


def run_all(folder: Path, results: Path, jobs: int) -> dict[Combination, Outcome]:
    from tests.conftest import link_copy, train_tokenizer

    checkout, tokenizer = link_copy(folder / "neox"), train_tokenizer(folder / "tokenizer.json")
    bench = Bench(checkout, tokenizer, folder)
    wanted = list(combinations())
    outcomes = {
        combination: Outcome("refused", line=line)
        for combination, line in bench.refusals(wanted).items()
    }
    for line in results.read_text().splitlines() if results.exists() else ():
        combination, outcome = json.loads(line)
        if (key := Combination(**combination)) in wanted and key not in outcomes:
            outcomes[key] = Outcome(**outcome)
    rest = [combination for combination in wanted if combination not in outcomes]
    for baseline in sorted({c.baseline for c in rest}, key=astuple):
        bench.outcome(baseline)  # before the others run side by side and ask for it
    for layout in sorted({(c.hybrid, c.tensor, c.pipeline) for c in rest if c.zero != 3}):
        bench._weights(*layout)
    with results.open("a") as file, ThreadPoolExecutor(jobs) as pool:
        for number, (combination, outcome) in enumerate(
            zip(rest, pool.map(bench.outcome, rest), strict=True), 1
        ):
            outcomes[combination] = outcome
            file.write(json.dumps([asdict(combination), asdict(outcome)]) + "\n")
            file.flush()
            print(f"{number}/{len(rest)} {combination}: {outcome}", flush=True)
    return {combination: outcomes[combination] for combination in wanted}


if __name__ == "__main__":
    main()
