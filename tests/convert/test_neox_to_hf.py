"""Exporting synthetic checkpoints of all layouts to Hugging Face folders."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import megatron_patch.hf  # noqa: F401  (registers the Auto classes)
from convert.hf_io import size_argument
from convert.neox_to_hf import neox_to_hf
from megatron_patch.hf.remote_code import AUTO_MAP
from tests.convert.conftest import write_tokenizer
from tests.convert.synthetic import TOKENS, Model, write

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "plain": Model(),
    "tied": Model(tied=True),
    "rmsnorm": Model(norm="rmsnorm", layers=1),
    "without self-augmentation": Model(self_augmentation=False, conv_width=2, layers=1),
    "keys as wide as values": Model(expand_k=1.0, norm="layernorm", layers=1),
    "bfloat16": Model(dtype=torch.bfloat16, layers=1),
    "hybrid": Model(attention=(1,), norm="rmsnorm"),
    "hybrid without biases": Model(attention=(0,), bias=False, layers=3),
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def trimmed(hf: dict[str, torch.Tensor], rows: int = TOKENS) -> dict[str, torch.Tensor]:
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight")
    return {name: t[:rows] if name in vocabulary else t for name, t in hf.items()}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_layout_gives_the_same_folder(model, vocab_file, tmp_path):
    files = {}
    for tp, pp in [(1, 0), (2, 0), (4, 0), (1, 1), (2, 2), (4, 1)]:
        hf = write(tmp_path / f"{tp}{pp}", model, tp, pp, vocab_file)
        neox_to_hf(tmp_path / f"{tp}{pp}", tmp_path / f"hf{tp}{pp}")
        assert_same(tensors_of(tmp_path / f"hf{tp}{pp}"), trimmed(hf))
        files[tp, pp] = {p.name: p.read_bytes() for p in (tmp_path / f"hf{tp}{pp}").iterdir()}
    assert all(folder == files[1, 0] for folder in files.values())


def test_the_folder_is_what_transformers_loads(vocab_file, tmp_path):
    model = Model(
        norm="rmsnorm",
        settings={
            "metala": {"tau": 8, "output_norm_eps": 1e-4, "conv_width": 4, "backend": "chunked"},
            "rms_norm_epsilon": 1e-7,
            "init_method_std": 0.01,
        },
    )
    hf = write(tmp_path / "neox", model, 2, 1, vocab_file)
    neox_to_hf(tmp_path / "neox", tmp_path / "hf")

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    assert_same(dict(loaded.state_dict()), trimmed(hf))
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.architectures == ["MetaLAForCausalLM"]
    assert config.tokenizer_class == "PreTrainedTokenizerFast"  # else no pipeline in transformers 4
    assert (config.tau, config.norm_eps, config.output_norm_eps) == (8.0, 1e-7, 1e-4)
    assert (config.norm_type, config.init_std, config.no_scale_embedding) == ("rmsnorm", 0.01, True)
    assert (config.vocab_size, config.glu_dim, config.tie_word_embeddings) == (TOKENS, 24, False)
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "float32"

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(tokenizer) == TOKENS
    assert tokenizer.encode("w3 w4") == [5, 6]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|padding|>")
    assert tokenizer.padding_side == "left"
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == vocab_file.read_bytes()
    for saved in (config, GenerationConfig.from_pretrained(tmp_path / "hf")):
        assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (0, 0, 1)
    batch = tokenizer(["w1", "w1 w2 w3"], padding=True, return_tensors="pt")
    assert loaded.generate(**batch, max_new_tokens=3).shape[1] == 6


def test_the_folder_carries_its_code(vocab_file, tmp_path):
    """`trust_remote_code` loads it where this package is not installed, which tests/hf covers."""
    write(tmp_path / "neox", Model(), 1, 0, vocab_file)
    neox_to_hf(tmp_path / "neox", tmp_path / "hf")
    named = json.loads((tmp_path / "hf/config.json").read_text())["auto_map"]
    assert named == AUTO_MAP and "AutoModelForCausalLM" in named
    for reference in named.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"hf/{module}.py").read_text()


def test_a_tokenizer_without_special_tokens(tmp_path):
    plain = write_tokenizer(tmp_path / "tokenizer.json", special=())
    write(tmp_path / "neox", Model(layers=1), 1, 0, plain)
    neox_to_hf(tmp_path / "neox", tmp_path / "hf")
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token is None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generate(torch.tensor([[3]]), max_new_tokens=4).shape == (1, 5)


def test_a_tokenizer_folder_is_copied(vocab_file, tmp_path):
    write(tmp_path / "neox", Model(layers=1), 1, 0, vocab_file)
    neox_to_hf(tmp_path / "neox", tmp_path / "first")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    config = json.loads((tmp_path / "first/tokenizer_config.json").read_text())
    config |= {"eos_token": "w0", "chat_template": "{{ messages[0]['content'] }}"}
    config["padding_side"] = "right"
    del config["model_input_names"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(vocab_file.read_bytes())
    neox_to_hf(tmp_path / "neox", tmp_path / "hf", tokenizer=folder)
    assert AutoConfig.from_pretrained(tmp_path / "hf").eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template == config["chat_template"] and tokenizer.padding_side == "left"
    kept = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert kept["model_input_names"] == ["input_ids", "attention_mask"]


def test_settings_spread_over_several_files(vocab_file, tmp_path):
    model = Model()
    settings = model.yaml(2, 1, vocab_file)
    own = {key: settings.pop(key) for key in ("num_layers", "model_parallel_size", "vocab_file")}
    own = {key.replace("_", "-"): value for key, value in own.items()}
    configs = {
        "model.yml": yaml.safe_dump(settings),
        "local.yml": json.dumps(own) + "  # a comment, as JSON-like files have them\n",
    }
    hf = write(tmp_path / "neox", model, 2, 1, vocab_file, configs=configs)
    neox_to_hf(tmp_path / "neox", tmp_path / "hf")
    assert_same(tensors_of(tmp_path / "hf"), trimmed(hf))

    # --config replaces them.
    (tmp_path / "neox/global_step7/configs/local.yml").write_text("num_layers: 5\n")
    given = []
    for name, text in configs.items():
        given.append(tmp_path / name)
        given[-1].write_text(text)
    neox_to_hf(tmp_path / "neox", tmp_path / "again", config=given)
    assert_same(tensors_of(tmp_path / "again"), trimmed(hf))


def test_the_tokenizer_is_found_from_where_training_started(tmp_path, monkeypatch):
    checkout = tmp_path / "gpt-neox"
    (checkout / "megatron").mkdir(parents=True)
    (checkout / "megatron/__init__.py").write_text("")
    (checkout / "data").mkdir()
    write_tokenizer(checkout / "data/tokenizer.json", ("<|endoftext|>",))
    write(tmp_path / "neox", Model(layers=1), 1, 0, Path("data/tokenizer.json"))
    monkeypatch.setenv("GPT_NEOX_PATH", str(checkout))
    neox_to_hf(tmp_path / "neox", tmp_path / "from_anywhere")
    monkeypatch.delenv("GPT_NEOX_PATH")
    monkeypatch.chdir(checkout)
    neox_to_hf(tmp_path / "neox", tmp_path / "from_there")
    for name in ("from_anywhere", "from_there"):
        assert AutoTokenizer.from_pretrained(tmp_path / name).eos_token == "<|endoftext|>"


def test_padding_is_kept_on_request(vocab_file, tmp_path):
    model = Model(layers=1)
    hf = write(tmp_path / "neox", model, 4, 1, vocab_file)
    neox_to_hf(tmp_path / "neox", tmp_path / "hf", keep_vocab_padding=True)
    assert_same(tensors_of(tmp_path / "hf"), hf)
    assert AutoConfig.from_pretrained(tmp_path / "hf").vocab_size == model.rows(4) == 128


def test_large_models_are_written_in_several_files(vocab_file, tmp_path):
    hf = write(tmp_path / "neox", Model(), 2, 0, vocab_file)
    neox_to_hf(tmp_path / "neox", tmp_path / "hf", max_shard_bytes=size_argument("10KB"))
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(p.stat().st_size < 14_000 for p in files)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in trimmed(hf).values())
    for file in files:
        assert {n for n, f in index["weight_map"].items() if f == file.name} == set(load_file(file))
    assert_same(tensors_of(tmp_path / "hf"), trimmed(hf))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_same(dict(loaded.state_dict()), trimmed(hf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype(dtype, vocab_file, tmp_path):
    hf = write(tmp_path / "neox", Model(layers=1), 2, 1, vocab_file)
    neox_to_hf(tmp_path / "neox", tmp_path / "hf", dtype=dtype)
    wanted = {name: tensor.to(dtype) for name, tensor in trimmed(hf).items()}
    assert_same(tensors_of(tmp_path / "hf"), wanted)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype="auto").dtype == dtype


def test_an_earlier_iteration(vocab_file, tmp_path):
    write(tmp_path / "neox", Model(layers=1), 1, 0, vocab_file, iteration=10)
    later = replace(Model(layers=1), dtype=torch.bfloat16)
    write(tmp_path / "neox", later, 1, 0, vocab_file, iteration=20)
    neox_to_hf(tmp_path / "neox", tmp_path / "latest")
    neox_to_hf(tmp_path / "neox", tmp_path / "earlier", iteration=10)
    assert tensors_of(tmp_path / "latest")["lm_head.weight"].dtype == torch.bfloat16
    assert tensors_of(tmp_path / "earlier")["lm_head.weight"].dtype == torch.float32


def as_file(*flags: str) -> None:
    """Runs the command in a process of its own, and repeats its output in this one."""
    command = [sys.executable, "convert/neox_to_hf.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(process.stdout, end="")
    print(process.stderr, end="", file=sys.stderr)
    sys.exit(process.returncode)


def as_module(*flags: str) -> None:
    """Runs the command as `python -m` does, in this process."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["neox_to_hf.py", *flags])
        patch.delitem(sys.modules, "convert.neox_to_hf")
        try:
            runpy.run_module("convert.neox_to_hf", run_name="__main__")
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)


@pytest.mark.parametrize("command", [as_file, as_module])
def test_the_command_prints_what_it_did(command, run_main, vocab_file, tmp_path):
    write(tmp_path / "neox", Model(layers=1), 2, 1, vocab_file)
    flags = ["--checkpoint", tmp_path / "neox", "--output", tmp_path / "new/hf"]
    process = run_main(lambda argv: command(*argv), *flags, "--max-shard-size", "1MB")
    assert process.returncode == 0, process.stderr
    assert "layer-file checkpoint, tensor parallel 2" in process.stdout
    assert "12,336 parameters, float32" in process.stdout
    assert "100%" in process.stderr  # the progress bar
    assert (tmp_path / "new/hf/model.safetensors").is_file()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("7", 7)]
)
def test_sizes(text, size):
    assert size_argument(text) == size
    with pytest.raises(ArgumentTypeError, match="wanted a size such as 5GB"):
        size_argument(text + "x")
