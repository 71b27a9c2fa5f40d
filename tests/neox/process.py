"""Runs Python code in a process of its own, in which GPT-NeoX is initialised with one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.neox.fork_server import fork_server
from tests.neox.training import free_port

# This part runs before the code.
PRELUDE = """
import json, os, signal, sys
import torch
from megatron.initialize import initialize_megatron
from megatron.neox_arguments import NeoXArgs

signal.alarm(300)
settings = json.loads(os.environ.pop("NEOX_SETTINGS"))
answer_file = os.environ.pop("NEOX_ANSWER")
def answer(value):
    with open(answer_file, "w") as file:
        json.dump(value, file)

neox_args = NeoXArgs.from_dict(settings)
neox_args.configure_distributed_args()
neox_args.build_tokenizer()
initialize_megatron(neox_args)
"""


class NeoXProcess:
    """Starts processes of a checkout's fork server, which has imported GPT-NeoX."""

    def __init__(self, checkout: Path, folder: Path):
        self.checkout, self.answer = checkout, folder / "answer"

    def __call__(self, settings: dict, code: str, interpret_triton: bool = False):
        """Runs `code`, which finds `neox_args`, `NeoXArgs`, `settings`, `json` and `torch`, and
        returns the value that it passes to `answer`. Triton's interpreter can be chosen only before
        GPT-NeoX is imported, so that takes a process of its own."""
        self.answer.unlink(missing_ok=True)
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": ""}
        store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        python = fork_server(self.checkout).python
        if interpret_triton:
            python, rank["TRITON_INTERPRET"] = sys.executable, "1"
        given = {"NEOX_SETTINGS": json.dumps(settings), "NEOX_ANSWER": str(self.answer)}
        run = subprocess.run(
            [python, "-c", PRELUDE + textwrap.dedent(code)],
            cwd=self.checkout,
            env={**os.environ, "OMP_NUM_THREADS": "1", **rank, **store, **given},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-6000:]
        return json.loads(self.answer.read_text())
