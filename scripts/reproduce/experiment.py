"""What the experiments share: settings from the command line, and a file of results."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import platform
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from kept import Kept
from training import Result, Run

from megatron_patch.commands.command_line import (
    CommandError,
    Parser,
    device,
    number,
    output_folder,
    whole,
)

OUTPUT = Path("runs/reproduce")

Settings = dict[str, Any]
POSITIVE = number(lambda value: value > 0, "above 0")
# Argument types of settings, where that of the usual value is not enough.
KINDS: dict[str, Callable[[str], Any]] = {
    "seed": whole(0),
    "decay": number(lambda value: value >= 0, "from 0"),
}


def as_it_is(case: Settings) -> Iterable[Settings]:
    """Yields the settings of a run as they are."""
    yield case


@dataclass(frozen=True)
class Experiment:
    """An experiment, which is a command.

    Each of its settings is an option. One run is made of each combination of the values of
    `swept`; other settings whose usual value is a list are lists in a run.

    Attributes:
        name: of the file of results.
        usual: the settings; the paper's, where it tells.
        tiny: what --tiny puts in their place.
        swept: names of settings, those of the outer loops first.
        run: trains by the settings of a run.
        kinds: argument types by name.
        check: raises a CommandError for settings that make no sense, before the first run.
        expand: yields the settings of the runs that a combination stands for.
        effect: whether the numbers of --tiny, by the values of the first setting that has several,
            show what they shall; and what that is.
        measure: the name of the number that counts.
    """

    name: str
    usual: Settings
    tiny: Settings
    swept: tuple[str, ...]
    run: Callable[[Settings, Run], Result]
    kinds: dict[str, Callable[[str], Any]] = field(default_factory=dict)
    check: Callable[[Settings], None] = lambda settings: None
    expand: Callable[[Settings], Iterable[Settings]] = as_it_is
    effect: tuple[Callable[[dict[Any, float]], bool], str] | None = None
    measure: str = "accuracy"

    def main(self) -> None:
        """Runs the experiment with the arguments of the command line."""
        args = vars(self._parser().parse_args())
        tiny, folder, jobs, minutes = (
            args.pop(name) for name in ("tiny", "output", "jobs", "minutes")
        )
        found = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
        where = torch.device(args.pop("device") or found)
        given = {name: value for name, value in args.items() if value is not None}
        settings = {**self.usual, **(self.tiny if tiny else {}), **given}
        self.check(settings)
        cases = self.cases(settings)
        folder = folder or (OUTPUT / "tiny" if tiny else OUTPUT)
        path = folder / f"{self.name}.jsonl"
        runs = sweep(path, cases, self.run, where, self.swept, jobs, minutes)
        for run in runs:
            told = ", ".join(f"{name} {run['settings'][name]}" for name in self.swept)
            print(f"{told}: {self.measure} {run[self.measure]} ({run['parameters']:,} parameters)")
        if tiny and not given and len(runs) == len(cases):
            self.show_effect(runs)
        print(path)

    def show_effect(self, runs: list[Result]) -> None:
        """Prints what the runs of --tiny show. Raises a CommandError if it is not plain to see."""
        if self.effect is None:
            return
        is_shown, wanted = self.effect
        varied = next(name for name in self.swept if len(self.tiny.get(name, ())) > 1)
        found = {run["settings"][varied]: run[self.measure] for run in runs}
        told = f"{varied} " + ", ".join(f"{value}: {number}" for value, number in found.items())
        if not is_shown(found):
            raise CommandError(f"{told}: wanted {wanted}")
        print(f"The effect is seen ({wanted}): {told}.")

    def cases(self, settings: Settings) -> list[Settings]:
        """Returns the settings of all runs, in values that JSON can hold."""
        found = []
        for values in itertools.product(*(settings[name] for name in self.swept)):
            case = {**settings, **dict(zip(self.swept, values, strict=True))}
            found += [json.loads(json.dumps(each)) for each in self.expand(case)]
        return found

    def _parser(self) -> argparse.ArgumentParser:
        parser = Parser(
            description=sys.modules[self.run.__module__].__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, value in self.usual.items():
            option, told = "--" + name.replace("_", "-"), f"by default {value}"
            first = value[0] if isinstance(value, list) else value
            if isinstance(first, bool):
                parser.add_argument(option, action=argparse.BooleanOptionalAction, help=told)
                continue
            kind = (KINDS | self.kinds).get(name) or (
                whole(1) if isinstance(first, int) else POSITIVE
            )
            several = dict(nargs="+") if isinstance(value, list) else {}
            parser.add_argument(option, type=kind, metavar="X", help=told, **several)
        add = parser.add_argument
        add("--tiny", action="store_true", help="under a minute on a CPU; shows the effect")
        add("--output", type=output_folder, metavar="FOLDER", help=f"by default {OUTPUT}")
        add("--device", type=device, help="by default CUDA where it is")
        add("--jobs", type=whole(1), default=1, metavar="N", help="runs side by side")
        add("--minutes", type=POSITIVE, default=math.inf, metavar="N",
            help="ends runs after this time; started again, they go on")  # fmt: skip
        return parser


def read_runs(path: Path) -> list[Result]:
    """Returns the runs in a file of results, a JSON object a line; none without a file."""
    runs = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for count, line in enumerate(lines, 1):
        try:
            run = json.loads(line)
            run["settings"]
        except (ValueError, KeyError, TypeError):
            raise CommandError(f"{path}:{count}: wanted a run as a line of JSON") from None
        runs.append(run)
    return runs


def sweep(
    path: Path,
    cases: list[Settings],
    run: Callable[[Settings, Run], Result],
    device: torch.device,
    titles: Iterable[str] = (),
    jobs: int = 1,
    minutes: float = math.inf,
) -> list[Result]:
    """Runs the cases that a file of results lacks, and returns the finished runs of all cases.

    A run is appended as one line when it ends, so a sweep that was interrupted goes on where it
    was. One that time cut off is a line marked `partial`, and goes on from files beside the
    results.

    Args:
        path: the file; its folder is made.
        cases: settings.
        run: trains by settings, and returns what shall be kept. It is a function of a module, since
            processes must find it.
        titles: settings that lines of progress begin with.
        jobs: number of processes side by side, over all GPUs that there are. 1 starts none.
        minutes: the time after which no run goes on.
    """
    until = time.time() + 60 * minutes
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [old for old in read_runs(path) if not old.get("partial")]
    finished = {index: old for index, case in enumerate(cases) for old in known
                if old["settings"] == case}  # fmt: skip
    missing = [index for index in range(len(cases)) if index not in finished]
    print(f"{path}: {len(finished)} of {len(cases)} runs are there", flush=True)
    work = functools.partial(_run_one, run, device, until, path.with_suffix(""), tuple(titles))
    for index, result in _results(work, [(index, cases[index]) for index in missing], jobs):
        if result is None:
            continue
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, allow_nan=False) + "\n")
        if not result.get("partial"):
            finished[index] = result
    return [finished[index] for index in sorted(finished)]


def _run_one(
    run: Callable[[Settings, Run], Result],
    device: torch.device,
    until: float,
    prefix: Path,
    titles: tuple[str, ...],
    case: Settings,
) -> Result | None:
    """Returns a run with its settings and provenance; `None` where no time is left to begin it."""
    if time.time() > until:
        return None
    title = "".join(f"{name} {case[name]}, " for name in titles)
    code = zlib.crc32(json.dumps(case, sort_keys=True).encode())
    kept = Kept(prefix.with_name(f"{prefix.name}-{code:08x}"))
    result = run(case, Run(device, until, title, kept))
    if not result.get("partial"):
        kept.remove()
    return {"settings": case, **result, **provenance(device)}


def _results(
    work: Callable[[Settings], Result | None], cases: list[tuple[int, Settings]], jobs: int
) -> Iterator[tuple[int, Result | None]]:
    """Yields the index and the result of each case as it ends."""
    if jobs == 1 or len(cases) < 2:
        for index, case in cases:
            yield index, work(case)
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    counter = context.Value("i", 0)
    workers = min(jobs, len(cases))
    with ProcessPoolExecutor(workers, context, _take_device, (counter,)) as pool:
        futures: dict[Future, int] = {pool.submit(work, case): index for index, case in cases}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _take_device(counter: Any) -> None:
    """Spreads processes over the GPUs. "cuda" without a number is then another one for each."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


@functools.cache
def provenance(device: torch.device) -> dict[str, str]:
    """Returns the command, the card, the date, the commit and PyTorch's version of a run."""
    root = Path(__file__).resolve().parents[2]
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True)
        commit = found.stdout.strip() if found.returncode == 0 else "unknown"
    except OSError:  # no git
        commit = "unknown"
    on_cuda = device.type == "cuda"
    return {
        "command": " ".join(["python", *sys.argv]),
        "card": torch.cuda.get_device_name(device) if on_cuda else f"CPU ({platform.machine()})",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit,
        "torch": torch.__version__,
    }
