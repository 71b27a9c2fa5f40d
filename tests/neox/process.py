"""Python code in a process of its own, in which a linked GPT-NeoX is initialised with one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.neox.training import free_port

PREAMBLE = """
import json, sys
from megatron.neox_arguments import NeoXArgs
from megatron.initialize import initialize_megatron
import torch
neox_args = NeoXArgs.from_dict(json.loads(sys.argv[1]))
neox_args.configure_distributed_args()
neox_args.build_tokenizer()
initialize_megatron(neox_args)
def answer(value):
    print("ANSWER" + json.dumps(value))
"""


def in_neox(checkout: Path, settings: dict, code: str):
    """Runs `code`, which finds `neox_args` and `torch`, and returns what it passes to `answer`."""
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), json.dumps(settings)],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    answers = [line for line in process.stdout.splitlines() if line.startswith("ANSWER")]
    return json.loads(answers[-1].removeprefix("ANSWER"))
