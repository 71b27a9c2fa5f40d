"""A run ends as a whole, whichever of its processes is ended, stopped or killed, and no other run
saves where it saves."""

from __future__ import annotations

import os
import queue
import re
import signal
import threading
from pathlib import Path

import psutil
import pytest

from megatron_patch.neox.upstream_fixes.processes import ChildProcess
from megatron_patch.neox.upstream_fixes.watchdog import VARIABLE
from megatron_patch.save_folder import LOCK, held
from tests.neox.training import LOSS, free_port, neox, settings, start


@pytest.fixture
def config(token_data, tokenizer_file, tmp_path) -> dict:
    """Returns the settings of a run of two ranks that does not end by itself."""
    return settings(
        token_data,
        tokenizer_file,
        save=str(tmp_path / "save"),
        checkpoint_factor=100_000,
        train_iters=100_000,
        lr_decay_iters=100_000,
        train_micro_batch_size_per_gpu=1,
        num_gpus=2,
    )


class Training:
    """A run that trains, with its processes: DeepSpeed's launcher and the ranks. Leaving the
    context kills them."""

    def __init__(self, checkout: Path, config: dict, folder: Path, **environment: str):
        self.deepy = start(checkout, "train.py", config, folder, **environment)
        self.processes: list[psutil.Process] = []
        self.lines: list[str] = []
        # Reads all output, because a process that prints to a full pipe waits.
        self.printed: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.deepy.stdout:
            self.printed.put(line)
        self.printed.put(None)

    def __enter__(self) -> Training:
        self.read_until(LOSS.search)
        family = psutil.Process(self.deepy.pid).children(recursive=True)
        self.launcher = psutil.Process(self.deepy.pid).children()[0]
        self.ranks = [p for p in self.launcher.children() if "train.py" in " ".join(p.cmdline())]
        self.processes = family
        assert len(self.ranks) == 2
        return self

    def read_until(self, is_found) -> None:
        while (line := self.printed.get(timeout=120)) is not None:
            self.lines.append(line)
            if is_found(line):
                return
        raise AssertionError("".join(self.lines)[-6000:])

    def end(self) -> int:
        """The exit code of `deepy.py`, once nothing is left of the run."""
        code = self.deepy.wait(timeout=60)
        _, alive = psutil.wait_procs(self.processes, timeout=20)
        assert not alive
        return code

    def __exit__(self, *_) -> None:
        self.deepy.kill()
        self.deepy.wait()
        for process in self.processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.reader.join(timeout=60)
        self.deepy.stdout.close()


def test_sigterm_ends_all_and_frees_the_folder(neox_checkout, config, tmp_path):
    save = tmp_path / "save"
    with Training(neox_checkout, config, tmp_path) as run:
        second = neox(neox_checkout, "train.py", config, tmp_path / "second")
        assert second.returncode == 1
        last = second.output.splitlines()[-1]
        assert last.startswith(f"MetaLA: save: found {save} in use by process {run.deepy.pid} on ")
        assert "Traceback" not in second.output and "end of arguments" not in second.output
        run.deepy.terminate()
        assert run.end() == 143
    assert not list(save.iterdir())


@pytest.mark.parametrize(("killed", "code"), [("launcher", 137), ("deepy", -9)])
def test_ranks_do_not_outlive_their_launcher(neox_checkout, config, tmp_path, killed, code):
    with Training(neox_checkout, config, tmp_path) as run:
        run.ranks[1].suspend()  # it cannot answer a signal
        getattr(run, killed).kill()
        if killed == "deepy":
            assert run.deepy.wait(timeout=60) == code
            run.ranks[1].resume()
        assert run.end() == code
    with held(config["save"]):  # at once
        pass


def test_a_stopped_rank_ends_the_run_and_is_named(neox_checkout, config, tmp_path):
    with Training(neox_checkout, config, tmp_path, **{VARIABLE: "12"}) as run:
        run.ranks[1].suspend()
        run.read_until(lambda line: "the run ends (" in line)
        assert run.lines[-1].startswith("MetaLA: no sign of life for 1")
        assert "from rank 1 on " in run.lines[-1]
        run.ranks[1].resume()  # which takes the launcher's SIGTERM; else SIGKILL comes 30 s later
        assert run.end() == 1


def test_a_child_takes_the_signals_of_its_parent():
    before = signal.getsignal(signal.SIGTERM)
    with ChildProcess(["sleep", "60"]) as child:
        signal.raise_signal(signal.SIGTERM)
        assert child.wait() == child.returncode == 143
    assert signal.getsignal(signal.SIGTERM) == before


SRUN = """#!/bin/sh
# srun -n 2 --export=ALL,... COMMAND: a rank on each of two nodes
while [ "${1#--export}" = "$1" ]; do shift; done; shift
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 SLURM_NTASKS=2 \\
    SLURM_STEP_TASKS_PER_NODE='1(x2)' "$@" &
  pids="$pids $!"
done
for pid in $pids; do wait $pid || exit 1; done
"""


def test_slurm_starts_one_rank_a_node(neox_checkout, config, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "sinfo": "#!/bin/sh\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    config |= {
        "train_iters": 2,
        "checkpoint_factor": 2,
        "hostfile": str(tmp_path / "hosts"),
        "launcher": "slurm",
        "deepspeed_slurm": True,
        "no_ssh_check": True,
        "master_port": free_port(),
    }
    del config["num_gpus"]
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(config["master_port"]),
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "2",
        "WANDB_MODE": "offline",
    }
    run = neox(neox_checkout, "train.py", config, tmp_path, **environment)
    assert run.returncode == 0, run.output[-6000:]
    assert sorted(run.losses) == [1, 2]
    (command,) = re.findall(r"cmd = srun .*", run.output)
    assert "WANDB_MODE=offline" in command  # which pdsh would not hand on by itself
    assert run.output.count("running on the CPU") == 2  # the launcher's line and rank 0's
    names = {path.name for path in (tmp_path / "save").iterdir()}
    assert names == {"global_step2", "latest"} and LOCK not in names
