"""Errors of the export: their lines, and that they leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from convert.command import ConvertError
from convert.neox_to_hf import main, neox_to_hf
from convert.output_folder import complete_folder
from megatron_patch.architecture import SettingsError
from tests.convert.conftest import write_tokenizer
from tests.convert.synthetic import Model, write

ROOT = Path(__file__).resolve().parents[2]
MODEL = Model()


def refused(tmp_path: Path, message: str, **options) -> str:
    """Converts tmp_path/neox, which must fail with `message` and leave no trace."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ConvertError, SettingsError), match=message) as info:
        neox_to_hf(tmp_path / "neox", tmp_path / "hf", **options)
    assert sorted(tmp_path.iterdir()) == before
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.fixture(params=[0, 1], ids=["mp_rank files", "layer files"])
def pp(request) -> int:
    return request.param


def holder(pp: int, layer: int, rank: int) -> str:
    """Returns the start of the name of the file that holds a layer."""
    return f"layer_{layer:02d}-model_{rank:02d}" if pp else f"mp_rank_{rank:02d}"


# where things are


def test_no_such_folder(tmp_path):
    refused(tmp_path, "neox is no checkpoint: no such folder")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "neox/src").mkdir(parents=True)
    refused(tmp_path, "neox is no checkpoint: it holds no global_stepN folder")


def test_the_folder_of_an_iteration(tmp_path, vocab_file):
    write(tmp_path / "neox", MODEL, 1, 0, vocab_file)
    (step,) = (tmp_path / "neox").glob("global_step*")
    number = step.name.removeprefix("global_step")
    with pytest.raises(ConvertError, match=f"wanted the folder above it, and --iteration {number}"):
        neox_to_hf(step, tmp_path / "hf")


def test_an_empty_iteration(tmp_path, vocab_file):
    write(tmp_path / "neox", MODEL, 1, 0, vocab_file)
    (tmp_path / "neox/global_step7/mp_rank_00_model_states.pt").unlink()
    refused(tmp_path, "global_step7 is no checkpoint: it holds neither layer_")


def test_an_absent_iteration_lists_those_present(tmp_path, vocab_file):
    for iteration in (9, 10):
        write(tmp_path / "neox", MODEL, 1, 0, vocab_file, iteration=iteration)
    refused(tmp_path, "has no iteration 11; it holds iterations 9, 10", iteration=11)
    (tmp_path / "neox/latest").write_text("global_step12\n")
    refused(tmp_path, "latest names 'global_step12', which is not there; .* iterations 9, 10")
    (tmp_path / "neox/latest").unlink()
    refused(tmp_path, "no file `latest`; choose by --iteration: it holds iterations 9, 10")


# settings


def test_settings_missing_or_given_twice(tmp_path, vocab_file):
    write(tmp_path / "neox", MODEL, 1, 0, vocab_file)
    configs = tmp_path / "neox/global_step7/configs"
    (configs / "local.yml").write_text('{"hidden-size": 64}')
    refused(tmp_path, "local.yml: hidden_size: found 64, and 32 in all.yml, wanted one value")
    (configs / "local.yml").write_text("a: [1\n")
    refused(tmp_path, "local.yml: not YAML")
    (configs / "local.yml").unlink()
    (configs / "all.yml").write_text("hidden_size: 32\n")
    refused(tmp_path, "num_layers: found nothing in the settings")
    (configs / "all.yml").unlink()
    refused(tmp_path, r"has no configs/\*.yml; give the run's by --config")
    refused(tmp_path, "nowhere.yml: cannot be read", config=[tmp_path / "nowhere.yml"])


HYBRID = {"attention_config": ["metala", "global"]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"attention_config": [[["metala", "mamba"], 1]]},
            r"attention_config: found layers 1 \(mamba\), which cannot be exported, wanted metala",
        ),
        (
            {"num_layers": 3, "attention_config": ["local", "bigbird", "metala"]},
            r"found layers 0 \(local\), 1 \(bigbird\), which cannot be exported, wanted metala, gl",
        ),
        ({"attention_config": None}, "attention_config: found no layer of type metala"),
        (
            {**HYBRID, "pos_emb": "alibi"},
            "pos_emb: found 'alibi', which cannot be exported, wanted none or rotary",
        ),
        ({**HYBRID, "use_qk_layernorm": True}, "use_qk_layernorm: found True, .* wanted False"),
        ({**HYBRID, "sliding_window_width": 64}, "sliding_window_width: found 64, .* wanted None"),
        ({**HYBRID, "rotary_save_freqs_buffer": True}, "rotary_save_freqs_buffer: found True"),
        ({**HYBRID, "te_mha": True}, "te_mha: found True"),
        ({**HYBRID, "intermediate_size": 92}, "mlp_multiple_of: found 1 with an MLP of 92"),
        ({**HYBRID, "num_kv_heads": 3}, "num_kv_heads: found 3, wanted a divisor of"),
        ({"gpt_j_residual": True}, "gpt_j_residual: found True"),
        ({"moe_num_experts": 4}, "moe_num_experts: found 4"),
        ({"attention_config": [[["metala"], 3]]}, "attention_config: found 3 layers, wanted"),
        ({"norm": "scalenorm"}, "norm: found 'scalenorm', which cannot be exported"),
        ({"pos_emb": "rotary"}, "pos_emb: found 'rotary', which cannot be exported"),
        ({"use_mup": True}, "use_mup: found True"),
        ({"metala": {"taw": 3}}, "metala.taw: unknown key"),
        ({"num_layers": "2"}, "num_layers: found '2', wanted a whole number"),
        ({"num_attention_heads": 5}, "hidden_size: found 32, wanted a multiple of .* 5"),
    ],
)
def test_models_that_cannot_be_exported(settings, message, tmp_path, vocab_file):
    text = yaml.safe_dump({**MODEL.yaml(1, 0, vocab_file), **settings})
    write(tmp_path / "neox", MODEL, 1, 0, vocab_file, configs={"all.yml": text})
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlp_multiple_of": 0}, "mlp_multiple_of: found 0, wanted a whole number of at least 1"),
        ({"intermediate_size": "24"}, "intermediate_size: found '24', wanted a whole number"),
        ({"intermediate_size": -24}, "intermediate_size: found -24, wanted a whole number"),
        ({"num_kv_heads": "4"}, "num_kv_heads: found '4', wanted a whole number"),
        ({"num_layers": True}, "num_layers: found True, wanted a whole number"),
        ({"pipe_parallel_size": "1"}, "pipe_parallel_size: found '1', wanted a whole number"),
        ({"intermediate_size": None, "expansion_factor": "3"}, "expansion_factor: found '3'"),
        (
            {"rms_norm_epsilon": "1e-6"},
            r"rms_norm_epsilon: found '1e-6', .* \(YAML reads it as text",
        ),
        ({"rms_norm_epsilon": 0}, "rms_norm_epsilon: found 0, wanted a number above 0"),
        ({"init_method_std": float("nan")}, "init_method_std: found nan"),
        ({"pos_emb": "rotary", "rotary_emb_base": "big"}, "rotary_emb_base: found 'big'"),
        ({"pos_emb": "rotary", "rotary_pct": 1.5}, "rotary_pct: found 1.5, which rotates 12"),
        ({"no_weight_tying": "false"}, "no_weight_tying: found 'false', wanted true or false"),
        ({"use_bias_in_mlp": "no"}, "use_bias_in_mlp: found 'no', wanted true or false"),
        ({"vocab_file": 5}, "vocab_file: found 5, wanted text"),
    ],
)
def test_odd_values_are_named(settings, message, tmp_path, vocab_file):
    model = Model(attention=(1,))
    text = yaml.safe_dump({**model.yaml(1, 0, vocab_file), **settings})
    write(tmp_path / "neox", model, 1, 0, vocab_file, configs={"all.yml": text})
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 64}, r"word_embeddings.weight has shape \(48, 32\), wanted \(48, 64\)"),
        ({"intermediate_size": 20}, r"mlp.gate_up_proj.weight has shape \(24, 32\)"),
        ({"metala": {"self_augmentation": False}}, "mixer.aug_balance is no tensor of this model"),
        ({"norm": "rmsnorm"}, "input_norm.scale is missing"),
        (
            {"num_layers": 3, "attention_config": [[["metala"], 3]]},
            "layer_04-.* the file is missing; num_layers is 3",
        ),
        (
            {"num_layers": 1, "attention_config": [[["metala"], 1]]},
            "layer_04-.* the file is missing; num_layers is 1",
        ),
        ({"no_weight_tying": False}, "layer_06-model_00-.* no layer of this model; .* tied"),
        ({"model_parallel_size": 4}, "layer_00-model_02.* missing; model_parallel_size is 4"),
        ({"model_parallel_size": 1}, "layer_00-model_01.* of rank 1, but model_parallel_size is 1"),
        ({"pipe_parallel_size": 0}, "a file of a pipeline, but .* pipe_parallel_size: 0"),
    ],
)
def test_settings_of_another_model(settings, message, tmp_path, vocab_file):
    text = yaml.safe_dump({**MODEL.yaml(2, 1, vocab_file), **settings})
    write(tmp_path / "neox", MODEL, 2, 1, vocab_file, configs={"all.yml": text})
    refused(tmp_path, message)


# tensors and files


def test_replicated_copies_that_differ(pp, tmp_path, vocab_file):
    def change(rank, layers):
        layers[3]["mixer.conv1d.weight"][5, 0, 1] += 1e-3 * rank

    write(tmp_path / "neox", MODEL, 2, pp, vocab_file, change=change)
    line = refused(tmp_path, "layer 3: mixer.conv1d.weight must be the same .* ranks 0 and 1")
    assert "differ by up to 1.0e-03" in line
    assert holder(pp, 3, 0) in line and holder(pp, 3, 1) in line


def test_a_tensor_too_many_too_few_or_of_another_shape(pp, tmp_path, vocab_file):
    def damaged(change, message):
        shutil.rmtree(tmp_path / "neox", ignore_errors=True)
        write(tmp_path / "neox", MODEL, 2, pp, vocab_file, change=change)
        assert holder(pp, 2, 1) in refused(tmp_path, message)

    def add(rank, layers):
        if rank == 1:
            layers[2]["mixer.extra"] = torch.zeros(1)

    def remove(rank, layers):
        if rank == 1:
            del layers[2]["mixer.out_proj.weight"]

    def cut(rank, layers):
        if rank == 1:
            layers[2]["mixer.in_proj.weight"] = layers[2]["mixer.in_proj.weight"][1:].clone()

    def halve(rank, layers):
        if rank == 1:
            layers[2]["mixer.out_proj.weight"] = layers[2]["mixer.out_proj.weight"].bfloat16()

    damaged(add, "layer 2: mixer.extra is no tensor of this model")
    damaged(remove, "layer 2: mixer.out_proj.weight is missing")
    damaged(cut, r"mixer.in_proj.weight has shape \(47, 32\), wanted \(48, 32\)")
    damaged(halve, "mixer.out_proj.weight is torch.bfloat16, on rank 0 it is torch.float32")


def test_files_missing_truncated_or_mixed(pp, tmp_path, vocab_file):
    write(tmp_path / "neox", MODEL, 2, pp, vocab_file)
    step = tmp_path / "neox/global_step7"
    kept = tmp_path / "kept"
    shutil.copytree(step, kept)

    def restore():
        shutil.rmtree(step)
        shutil.copytree(kept, step)

    file = next(step.glob(holder(pp, 3, 1) + "*"))
    whole = file.read_bytes()
    for length in (0, 1, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert file.name in refused(tmp_path, "truncated or no PyTorch file")

    restore()
    for name in step.glob("*model_01*") if pp else step.glob("mp_rank_01*"):
        name.unlink()
    refused(tmp_path, f"{holder(pp, 0, 1)}.* the file is missing; model_parallel_size is 2")

    if pp:
        restore()
        file = next(step.glob("layer_03-model_01*"))
        file.unlink()
        assert file.name in refused(tmp_path, "the file is missing; num_layers is 2")

        restore()
        for name in step.glob("layer_*"):
            name.unlink()
        refused(tmp_path, "no tensors under 'module': the layer_.* are missing")

    restore()
    file = step / "mp_rank_01_model_states.pt"
    states = torch.load(file, weights_only=False)
    torch.save({**states, "iteration": 6}, file)
    refused(tmp_path, "mp_rank_01.* a file of iteration 6 in the folder of 7")
    torch.save({**states, "args": {"num_layers": 3}}, file)
    refused(tmp_path, "mp_rank_01.* saved with num_layers 3, but the settings say 2")


@pytest.mark.parametrize(
    ("pp", "one", "other"),
    [
        (1, "layer_03-model_00-model_states.pt", "layer_03-model_01-model_states.pt"),
        (1, "layer_02-model_01-model_states.pt", "layer_03-model_01-model_states.pt"),
        (1, "mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
        (0, "mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
    ],
)
def test_files_that_were_exchanged(pp, one, other, tmp_path, vocab_file):
    """All tensors have the right shapes; only the name stored inside a file is wrong."""
    write(tmp_path / "neox", MODEL, 2, pp, vocab_file)
    first, second = (tmp_path / "neox/global_step7" / name for name in (one, other))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    line = refused(tmp_path, f"{first.name}: the file was saved as {second.name}: it was renamed")
    second.write_bytes(contents[1])  # now a copy of one over the other
    assert line == refused(tmp_path, "the file was saved as")


def test_files_that_were_renamed_by_no_name_of_gpt_neox(tmp_path, vocab_file):
    """Other ways of writing a checkpoint store no name, or a temporary one."""
    write(tmp_path / "neox", MODEL, 1, 1, vocab_file)
    step = tmp_path / "neox/global_step7"
    for file, name in (("layer_02", "checkpoint.tmp"), ("layer_03", None)):
        path = step / f"{file}-model_00-model_states.pt"
        content = torch.load(path)
        if name:
            torch.save(content, step / name)
            (step / name).rename(path)
        else:
            with path.open("wb") as stream:
                torch.save(content, stream)
    neox_to_hf(tmp_path / "neox", tmp_path / "hf")


class RunsCode:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["", "format before PyTorch 1.6"])
@pytest.mark.parametrize("where", ["tensors", "states"])
def test_files_that_would_run_code(where, zipped, pp, tmp_path, vocab_file):
    write(tmp_path / "neox", MODEL, 1, pp, vocab_file)
    name = holder(pp, 2, 0) if where == "tensors" else "mp_rank_00"
    file = next((tmp_path / "neox/global_step7").glob(name + "*"))
    malicious = {"module": RunsCode(tmp_path / "witness")}
    torch.save(malicious, file, _use_new_zipfile_serialization=zipped)
    assert file.name in refused(tmp_path, "refused: reading it would run code, it holds posix")
    assert not (tmp_path / "witness").exists()


def test_values_too_large_for_float16(tmp_path, vocab_file):
    def change(rank, layers):
        layers[2]["mixer.out_proj.weight"][0, 0] = 1e6

    write(tmp_path / "neox", MODEL, 1, 0, vocab_file, change=change)
    message = "layers.0.token_mixer.out_proj.weight: 1.0e.06 is too large for float16"
    refused(tmp_path, message, dtype=torch.float16)


# the tokenizer


def test_tokenizers_missing_or_of_another_training(tmp_path, vocab_file):
    write(tmp_path / "neox", MODEL, 1, 0, tmp_path / "gone.json")
    refused(tmp_path, "vocab_file .*gone.json of the settings is not there; .* --tokenizer")
    refused(tmp_path, "--tokenizer .*no.json: no such file", tokenizer=tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{}")
    refused(tmp_path, "bad.json: no tokenizer.json", tokenizer=tmp_path / "bad.json")
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path, "empty: holds no tokenizer, wanted tokenizer.json", tokenizer=tmp_path / "empty"
    )
    small = write_tokenizer(tmp_path / "small.json", ("<|endoftext|>",), tokens=70)
    refused(tmp_path, "small.json has 70 tokens, padded 80, .* 96 rows", tokenizer=small)
    large = write_tokenizer(tmp_path / "large.json", ("<|endoftext|>",), tokens=97)
    refused(tmp_path, "large.json has 97 tokens, padded 112", tokenizer=large)


def test_a_tokenizer_type_without_tokenizer_json(tmp_path, vocab_file):
    model = Model(settings={"tokenizer_type": "GPT2BPETokenizer"})
    write(tmp_path / "neox", model, 1, 0, vocab_file)
    refused(tmp_path, "tokenizer_type: found 'GPT2BPETokenizer' .* give one by --tokenizer")
    neox_to_hf(tmp_path / "neox", tmp_path / "hf", tokenizer=vocab_file)


# the output


def test_nothing_is_overwritten_unasked(tmp_path, vocab_file):
    write(tmp_path / "neox", MODEL, 1, 0, vocab_file)
    (tmp_path / "hf").mkdir()  # an empty folder may be replaced
    neox_to_hf(tmp_path / "neox", tmp_path / "hf")
    refused(tmp_path, "hf exists already; --overwrite replaces it")
    (tmp_path / "hf/config.json").write_text("of the folder replaced")
    neox_to_hf(tmp_path / "neox", tmp_path / "hf", overwrite=True)
    assert "metala" in (tmp_path / "hf/config.json").read_text()
    (tmp_path / "hf/notes").mkdir()
    (tmp_path / "hf/notes/mine.txt").write_text("mine")
    refused(tmp_path, "notes/mine.txt is no file of the export that is there", overwrite=True)
    assert (tmp_path / "hf/notes/mine.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "neox"]


def test_a_failure_leaves_the_folder_that_was_there(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("old")
    with pytest.raises(ZeroDivisionError):
        with complete_folder(tmp_path / "hf", overwrite=True, check=lambda folder: None) as folder:
            (folder / "config.json").write_text("new")
            raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf/config.json").read_text() == "old"


def test_an_output_that_cannot_be_written(tmp_path, vocab_file):
    write(tmp_path / "neox", MODEL, 1, 0, vocab_file)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvertError, match="cannot be written"):
        neox_to_hf(tmp_path / "neox", tmp_path / "file/hf")


def test_a_disk_without_room(tmp_path, vocab_file, monkeypatch):
    write(tmp_path / "neox", MODEL, 1, 0, vocab_file)
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    with monkeypatch.context() as undone:
        undone.setattr(shutil, "disk_usage", lambda path: usage)
        refused(tmp_path, f"{tmp_path}: the tensors take 0.1 MB, but the disk has only 0.0 MB free")


def test_a_disk_that_is_full(tmp_path, vocab_file, monkeypatch):
    """The second file of tensors is a link to /dev/full."""
    write(tmp_path / "neox", MODEL, 1, 0, vocab_file)

    def write_config_and_link(folder, *arguments):
        (folder / "model-00002-of-00003.safetensors").symlink_to("/dev/full")

    monkeypatch.setattr("convert.neox_to_hf.write_config", write_config_and_link)
    line = refused(tmp_path, "hf: cannot be written: .* No space left", max_shard_bytes=30_000)
    assert "model-00002-of-00003.safetensors" in line


def test_the_command_fails_with_one_line(run_main, tmp_path):
    process = run_main(main, "--checkpoint", tmp_path, "--output", "x")
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr == (
        f"command: {tmp_path} is no checkpoint: it holds no global_stepN folder\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_leaves_nothing(number, tmp_path, vocab_file):
    write(tmp_path / "neox", MODEL, 1, 0, vocab_file)
    # The last tensor waits, so that the signal comes while the folder is half written.
    program = (
        "import time, convert.neox_to_hf as c, convert.neox_reader as n\n"
        "full = n.NeoXCheckpoint.full\n"
        "def slow(self, rule, out):\n"
        "    if rule.name == 'final_linear.weight': print('waiting', flush=True); time.sleep(60)\n"
        "    return full(self, rule, out)\n"
        "n.NeoXCheckpoint.full = slow\n"
        "c.cli()\n"
    )
    flags = ["--checkpoint", tmp_path / "neox", "--output", tmp_path / "out/hf"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with SIGINT ignored, which processes inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "waiting\n"
    assert [p.name for p in (tmp_path / "out").iterdir()] != ["hf"]
    time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode not in (0, None)
    assert "Traceback" not in errors
    assert list((tmp_path / "out").iterdir()) == []
