"""Writes the model's code into a model folder, for `from_pretrained(..., trust_remote_code=True)`
where this package is not installed.

transformers wants flat files, and before version 5 it copies only those that the model's own file
imports. So every file is a copy under a name of its own, and the operators are one file: the plain
PyTorch form of `megatron_patch.ops`, followed by the text of `ops_metala.py`, which prefers the
package's operators where it is installed.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

from megatron_patch import architecture
from megatron_patch.hf import ops_metala
from megatron_patch.ops import torch_ops

OPERATORS_FILE = "ops_metala.py"
ARCHITECTURE_FILE = "architecture_metala.py"
_FILES = {path.name for path in Path(__file__).parent.glob("*_metala.py")}
COPIED_FILES = tuple(sorted(_FILES - {OPERATORS_FILE, ARCHITECTURE_FILE}))
AUTO_MAP = {
    "AutoConfig": "configuration_metala.MetaLAConfig",
    "AutoModel": "modeling_metala.MetaLAModel",
    "AutoModelForCausalLM": "modeling_metala.MetaLAForCausalLM",
    "AutoModelForSequenceClassification": "modeling_metala.MetaLAForSequenceClassification",
}


def write_model_code(folder: str | os.PathLike) -> None:
    """Writes the model's code into an existing folder, over files of the same names, and names it
    in the folder's config.json if there is one."""
    folder = Path(folder)
    for name in COPIED_FILES:
        source = (Path(__file__).parent / name).read_text(encoding="utf-8")
        (folder / name).write_text(source, encoding="utf-8")
    (folder / OPERATORS_FILE).write_text(operators_source(), encoding="utf-8")
    (folder / ARCHITECTURE_FILE).write_text(inspect.getsource(architecture), encoding="utf-8")
    config = folder / "config.json"
    if config.exists():
        values = json.loads(config.read_text(encoding="utf-8"))
        values["auto_map"] = AUTO_MAP
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
        config.write_text(f"{text}\n", encoding="utf-8")


def operators_source() -> str:
    """Returns the text of the folder's `ops_metala.py`."""
    return f"{inspect.getsource(torch_ops)}\n\n{inspect.getsource(ops_metala)}"
