"""The model's code inside a model folder, for `from_pretrained(..., trust_remote_code=True)` where
this package is not installed.

transformers asks for flat files, and before version 5 copies only those that the model's own file
imports. So the folder's `ops_metala.py` is one file: `exported_ops.py`, with the definitions that
it imports from `megatron_patch.ops` written out. There is no second implementation to keep equal.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import os
from importlib import import_module
from pathlib import Path

import megatron_patch
from megatron_patch import architecture

COPIED_FILES = (
    "attention_metala.py",
    "cache_metala.py",
    "configuration_metala.py",
    "decoding_metala.py",
    "documents_metala.py",
    "generation_metala.py",
    "layers_metala.py",
    "modeling_metala.py",
    "pretrained_metala.py",
)
OPERATORS_FILE = "ops_metala.py"
ARCHITECTURE_FILE = "architecture_metala.py"
AUTO_MAP = {
    "AutoConfig": "configuration_metala.MetaLAConfig",
    "AutoModel": "modeling_metala.MetaLAModel",
    "AutoModelForCausalLM": "modeling_metala.MetaLAForCausalLM",
}

OPERATORS_DOCSTRING = f"""\
The operators that the model calls: those of the package `megatron_patch` where it is installed,
plain PyTorch otherwise. Written from the sources of its version {megatron_patch.__version__}; not
meant to be edited."""


def write_model_code(folder: str | os.PathLike) -> None:
    """Writes the model's code into a folder, and names it in the folder's config.json if there is
    one.

    Args:
        folder: an existing folder. Files of the code's names are overwritten.
    """
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
        config.write_text(
            json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )


def operators_source() -> str:
    """The text of the folder's `ops_metala.py`."""
    top = _Source("megatron_patch.hf.exported_ops")
    definitions: dict[tuple[str, str], str] = {}
    imports = dict(top.imports)
    for name, module in top.inlined.items():
        _collect(_Source(module), name, definitions, imports)
    if len({name for _, name in definitions}) < len(definitions):
        raise ValueError(f"two definitions of one name among {sorted(definitions)}")

    # What the sources say about their methods at their top.
    modules = dict.fromkeys(top.inlined.values())
    about = [OPERATORS_DOCSTRING, *(inspect.getdoc(import_module(m)) for m in modules)]
    # As ruff sorts them: `import` before `from`, torch after the standard library.
    lines = sorted(imports.values(), key=lambda line: (line.startswith("from "), line))
    standard = "\n".join(line for line in lines if "torch" not in line)
    torch = "\n".join(line for line in lines if "torch" in line)
    docstring = '"""' + "\n\n".join(about) + '\n"""'
    head = "\n\n".join([docstring, "from __future__ import annotations", standard, torch])
    return "\n\n\n".join([head, *definitions.values(), top.body]) + "\n"


class _Source:
    """A module's text, taken apart.

    Attributes:
        module: its name.
        imports: name to import statement, for imports from elsewhere.
        inlined: name to module, for imports from `megatron_patch.ops`.
        definitions: name to its top-level statement.
        body: the text below the imports.
    """

    def __init__(self, module: str):
        self.module = module
        self.text = inspect.getsource(import_module(module))
        self.imports: dict[str, str] = {}
        self.inlined: dict[str, str] = {}
        self.definitions: dict[str, ast.stmt] = {}
        last_import_line = 0
        for node in ast.parse(self.text).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                last_import_line = node.end_lineno
                self._add_import(node)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self.definitions[ast.unparse(target)] = node
        self.body = "\n".join(self.text.splitlines()[last_import_line:]).strip()

    def text_of(self, node: ast.stmt) -> str:
        """A statement as it is written, with its decorators."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return "\n".join(self.text.splitlines()[first - 1 : node.end_lineno])

    def _add_import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name
            statement = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
            if isinstance(node, ast.Import):
                self.imports[name] = statement
            elif node.module.startswith("megatron_patch."):
                self.inlined[name] = node.module
            elif node.module != "__future__":
                self.imports[name] = f"from {node.module} {statement}"


def _collect(
    source: _Source,
    name: str,
    definitions: dict[tuple[str, str], str],
    imports: dict[str, str],
) -> None:
    """Adds the definition of `name`, those that it uses before it, and the imports of all."""
    if (source.module, name) in definitions:
        return
    if name not in source.definitions:
        raise ValueError(f"{source.module}: no definition of {name}")
    node = source.definitions[name]
    for used in dict.fromkeys(n.id for n in ast.walk(node) if isinstance(n, ast.Name)):
        if used == name or hasattr(builtins, used):
            continue
        if used in source.inlined:
            _collect(_Source(source.inlined[used]), used, definitions, imports)
        elif used in source.definitions:
            _collect(source, used, definitions, imports)
        elif used in source.imports:
            imports[used] = source.imports[used]
    definitions[source.module, name] = source.text_of(node)


__all__ = ["AUTO_MAP", "operators_source", "write_model_code"]
