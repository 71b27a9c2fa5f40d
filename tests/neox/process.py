"""Python code in a process of its own, in which a linked GPT-NeoX is initialised with one rank.

One process imports GPT-NeoX, which takes seconds, and forks for each piece of code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.neox.training import free_port

SERVER = """
import json, os, signal, sys, traceback
import torch
import megatron.training
from megatron.initialize import initialize_megatron
from megatron.neox_arguments import NeoXArgs

def run(settings, code, port, log, answer):
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(300)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    neox_args = NeoXArgs.from_dict(settings)
    neox_args.configure_distributed_args()
    neox_args.build_tokenizer()
    initialize_megatron(neox_args)
    def write(value):
        with open(answer, "w") as file:
            json.dump(value, file)
    exec(code, {"answer": write, "json": json, "neox_args": neox_args, "settings": settings,
                "torch": torch, "NeoXArgs": NeoXArgs})

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(**json.loads(line))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    print("EXIT", status, flush=True)
"""


class NeoXProcess:
    """GPT-NeoX of a checkout, imported."""

    def __init__(self, checkout: Path, folder: Path):
        self.log, self.answer = folder / "log", folder / "answer"
        with (folder / "server.log").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                cwd=checkout,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __call__(self, settings: dict, code: str):
        """Runs `code`, which finds `neox_args` and `torch`, and returns what it passes to
        `answer`."""
        for file in (self.log, self.answer):
            file.unlink(missing_ok=True)
        job = {
            "settings": settings,
            "code": textwrap.dedent(code),
            "port": free_port(),
            "log": str(self.log),
            "answer": str(self.answer),
        }
        print(json.dumps(job), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("EXIT"):
                assert line == "EXIT 0\n", self.log.read_text()[-6000:]
                return json.loads(self.answer.read_text())
        raise AssertionError(self.log.with_name("server.log").read_text()[-6000:])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
