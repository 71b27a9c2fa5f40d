"""Model folders that carry the model's code, with and without this package."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import check_imports

import megatron_patch.architecture
from megatron_patch import ops
from megatron_patch.hf import MetaLAForCausalLM, modeling_metala, ops_metala
from megatron_patch.hf.remote_code import AUTO_MAP, operators_source, write_model_code
from tests.hf.conftest import KINDS

IDS = [[5, 6, 7, 8, 9, 10, 11]]
CODE_FILES = {
    "architecture_metala.py",
    "attention_metala.py",
    "cache_metala.py",
    "classification_metala.py",
    "configuration_metala.py",
    "decoding_metala.py",
    "documents_metala.py",
    "generation_metala.py",
    "layers_metala.py",
    "modeling_metala.py",
    "ops_metala.py",
    "pretrained_metala.py",
}
# Hides all packages but torch, transformers and what these require.
ONLY_TORCH_AND_TRANSFORMERS = """
import sys
for name in ("megatron_patch", "convert", "accelerate", "causal_conv1d", "datasets", "deepspeed",
             "einops", "fla", "peft", "pydantic"):
    sys.modules[name] = None
"""
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM

def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    return model

def operator_modules(model):
    module = sys.modules[type(model).__module__]
    return [module.meta_linear_attention.__module__, module.short_convolution.__module__]
"""


def run(code, *arguments, folder, before=ONLY_TORCH_AND_TRANSFORMERS):
    """Runs `code` in a fresh process outside the repository and returns its last line."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-c", before + LOAD + code, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.fixture
def exported(request, tiny_model, tmp_path):
    """A model, and a folder that holds its weights and code."""
    model = tiny_model(**KINDS[getattr(request, "param", "metala")])
    model.save_pretrained(tmp_path / "model")
    write_model_code(tmp_path / "model")
    return model, tmp_path / "model"


def test_the_folder_is_flat_and_names_its_code(exported):
    model, folder = exported
    assert {path.name for path in folder.glob("*.py")} == CODE_FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["decoder_embed_dim"] == model.config.decoder_embed_dim
    architecture = Path(megatron_patch.architecture.__file__).read_bytes()
    assert (folder / "architecture_metala.py").read_bytes() == architecture
    for name in CODE_FILES - {"architecture_metala.py", "ops_metala.py"}:
        own = Path(modeling_metala.__file__).with_name(name)
        assert (folder / name).read_bytes() == own.read_bytes()
    operators = (folder / "ops_metala.py").read_text()
    assert operators.startswith(Path(ops.torch_ops.__file__).read_text())
    assert operators.endswith(Path(ops_metala.__file__).read_text())


def test_every_file_imports_nothing_that_may_be_missing(exported, tmp_path):
    """transformers checks each file by its text, when it fetches a folder from a hub."""
    _, folder = exported
    code = """
from transformers.dynamic_module_utils import check_imports
print(sorted({needed for file in sys.argv[1:] for needed in check_imports(file)}))
"""
    files = [folder / name for name in CODE_FILES]
    needed = {f"{name.removesuffix('.py')}" for name in CODE_FILES} - {"modeling_metala"}
    assert run(code, *files, folder=tmp_path) == str(sorted(needed))
    # Before version 5 only what the model's own file imports is copied from a local folder.
    assert set(check_imports(folder / "modeling_metala.py")) == needed


@pytest.mark.parametrize("exported", KINDS, indirect=True)
def test_with_torch_and_transformers_alone(exported, tmp_path):
    model, folder = exported
    code = """
model = load(sys.argv[1])
assert all(name.startswith("transformers_modules.") for name in operator_modules(model))
ids = torch.tensor(eval(sys.argv[2]))
torch.save(model(ids).logits.detach(), "logits.pt")
print(model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None).tolist())
"""
    line = run(code, folder, IDS, folder=tmp_path)
    ids = torch.tensor(IDS)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert line == str(expected.tolist())
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(ids).logits)


def test_recorded_steps_with_torch_and_transformers_alone(exported, tmp_path):
    """The folder's own classes replay a step. On a CPU the captured graph is the step itself."""
    model, folder = exported
    code = """
model = load(sys.argv[1])
decoding = sys.modules[type(model).__module__.replace("modeling_metala", "decoding_metala")]
made = []
decoding._can_capture_on = lambda device: True
decoding.capture_cuda_graph = lambda step: made.append(step) or step
cache = decoding.MetaLACache(model.config, decoding_graph="eager")
how = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
out = model.generate(torch.tensor(eval(sys.argv[2])), past_key_values=cache, **how)
assert len(made) == 1
print(out.tolist())
"""
    line = run(code, folder, IDS, folder=tmp_path)
    ids = torch.tensor(IDS)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert line == str(expected.tolist())


def test_saved_and_loaded_again_without_the_package(exported, tmp_path):
    model, folder = exported
    code = """
model = load(sys.argv[1])
model.save_pretrained(sys.argv[2])
torch.save(model(torch.tensor(eval(sys.argv[3]))).logits.detach(), "logits.pt")
print(sorted(model.config.auto_map))
"""
    for source, target in ((folder, "second"), ("second", "third"), ("third", "fourth")):
        assert run(code, source, target, IDS, folder=tmp_path) == str(sorted(AUTO_MAP))
    for name in CODE_FILES:
        assert (tmp_path / "fourth" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((tmp_path / "fourth/config.json").read_text())["auto_map"] == AUTO_MAP
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.tensor(IDS)).logits)


def test_the_installed_package_supplies_the_operators(exported, tmp_path):
    _, folder = exported
    code = """
model = load(sys.argv[1])
assert "megatron_patch.hf" not in sys.modules
print(operator_modules(model))
"""
    # The process starts outside the repository, where the package may not be installed.
    path = f"import sys; sys.path.append({str(Path(ops.__file__).parents[2])!r})\n"
    wanted = [ops.meta_linear_attention.__module__, ops.short_convolution.__module__]
    assert run(code, folder, folder=tmp_path, before=path) == str(wanted)


def test_code_is_not_lost_when_the_package_loads_and_saves(exported, tmp_path):
    model, folder = exported
    loaded = MetaLAForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == CODE_FILES
    config = AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert config.auto_map == AUTO_MAP
    code = "load(sys.argv[1]); print('loaded')"
    assert run(code, tmp_path / "saved", folder=tmp_path) == "loaded"

    model.save_pretrained(tmp_path / "without")  # never had code of its own
    assert not list((tmp_path / "without").glob("*.py"))


def test_the_package_loads_the_folder_by_its_own_classes_unless_trusted(exported):
    _, folder = exported
    assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)) is (
        MetaLAForCausalLM
    )


@pytest.fixture(scope="module")
def standalone(tmp_path_factory):
    """The folder's operators, loaded where the package cannot be imported."""
    path = tmp_path_factory.mktemp("operators") / "standalone_ops.py"
    path.write_text(operators_source())
    spec = importlib.util.spec_from_file_location("standalone_ops", path)
    module = importlib.util.module_from_spec(spec)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    sys.modules["megatron_patch"] = None
    sys.modules["standalone_ops"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["standalone_ops"]
        sys.modules.update(hidden)
    return module


def _is_ours(name: str) -> bool:
    return name == "megatron_patch" or name.startswith("megatron_patch.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_the_folders_operators_equal_the_packages(standalone, dtype, packed):
    assert standalone.meta_linear_attention is not ops.meta_linear_attention
    batch, time, heads, key, value = 1 if packed else 2, 70, 2, 4, 8
    bounds = torch.tensor([0, 3, 3, 41, 70], dtype=torch.int32) if packed else None
    states = 4 if packed else batch
    wide = torch.promote_types(dtype, torch.float32)
    how = dict(output_final_state=True, cu_seqlens=bounds)

    q, gate_logits = torch.randn(2, batch, time, heads, key).to(dtype)
    v, out_gate = torch.randn(2, batch, time, heads, value).to(dtype)
    inputs = (q, gate_logits, v, torch.randn(heads, key).to(dtype), out_gate)
    how["initial_state"] = torch.randn(states, heads, key, value, dtype=wide)
    scalars = dict(tau=16.0, scale=key**-0.5, norm_eps=1e-5)
    found = standalone.meta_linear_attention(*inputs, **scalars, **how)
    expected = ops.meta_linear_attention(*inputs, **scalars, **how, backend="chunked")
    assert all(map(torch.equal, found, expected))
    found = standalone.meta_linear_attention(*inputs, **scalars, **how, inplace_final_state=True)
    assert found[1] is how["initial_state"]
    assert all(map(torch.equal, found, expected))

    x, weight = torch.randn(batch, time, 6).to(dtype), torch.randn(6, 1, 4)
    how["initial_state"] = torch.randn(states, 6, 3).to(dtype)
    found = standalone.short_convolution(x, weight, **how)
    expected = ops.short_convolution(x, weight, **how, backend="torch")
    assert all(map(torch.equal, found, expected))
    found = standalone.short_convolution(x, weight, **how, inplace_final_state=True)
    assert found[1] is how["initial_state"]
    assert all(map(torch.equal, found, expected))


def test_the_folders_operator_keeps_its_precision_under_autocast(standalone):
    """Autocast changes no bit of the results, as with the package's operator."""
    q, gate_logits = torch.randn(2, 1, 70, 2, 4)
    v, out_gate = torch.randn(2, 1, 70, 2, 8)
    scalars = dict(tau=16.0, scale=0.5, norm_eps=1e-5, output_final_state=True)
    inputs = (q, gate_logits, v, None, out_gate)
    expected = standalone.meta_linear_attention(*inputs, **scalars)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = standalone.meta_linear_attention(*inputs, **scalars)
        packages = ops.meta_linear_attention(*inputs, **scalars, backend="chunked")
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, found, packages))
    gate, up = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(standalone.swiglu(gate, up), ops.swiglu(gate, up))
