"""Training through the stock `deepy.py train.py`: parallel layouts, resuming, logging, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
from pathlib import Path

import pytest
import torch

from convert import reshape_neox
from tests.conftest import find_neox
from tests.neox.conversion import convert, export
from tests.neox.training import FLOPS, LOSS, Run, neox, settings, start, train, train_once

LAYOUTS = [(1, 1), (2, 1), (1, 2)]  # (tensor, pipeline) parallel; (1, 0) is what they must equal


@pytest.fixture(scope="module")
def reference(neox_checkout, token_data, tokenizer_file, make_once) -> tuple[Run, Path]:
    """Twenty steps on one rank without a pipeline, logged by wandb offline, with checkpoints of
    steps 0 and 20, in the folder `checkpoints` of the one returned."""
    config = settings(
        token_data,
        tokenizer_file,
        checkpoint_factor=20,
        eval_interval=10,
        use_wandb=True,
        wandb_project="metala",
    )
    # the one training here that the plain interpreter starts
    environment = {"python": sys.executable, "WANDB_MODE": "offline"}
    return train_once(make_once, "reference", neox_checkout, config, **environment)


@pytest.fixture(scope="module")
def reference_at_start(neox_checkout, reference, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The tensors of the reference before its first step, as Hugging Face has them."""
    output = tmp_path_factory.mktemp("reference_at_start") / "hf"
    return export(neox_checkout, reference[1] / "checkpoints", output, "--iteration", 0)


def test_the_loss_falls(reference):
    run, _ = reference
    assert "no CUDA device and distributed_backend: gloo, running on the CPU" in run.output
    assert "deepspeed_shm_comm" not in run.output  # nothing was compiled for DeepSpeed
    assert sorted(run.losses) == list(range(1, 21))
    assert run.losses[20] < 0.8 * run.losses[1]


def test_printed_flops_follow_from_the_printed_time(reference):
    """2 per weight of every matrix and 5 H K V per token and layer forward, thrice that in all."""
    matrices = 2 * (192 * 64 + 64 * 64 + 192 * 64 + 64 * 96 + 64 * 4) + 512 * 64
    flops = 3 * 4 * 64 * (2 * matrices + 2 * 4 * 5 * 8 * 16)
    milliseconds, printed, unit = FLOPS.findall(reference[0].output)[-1]
    expected = flops / (float(milliseconds) / 1000) / {"M": 1e6, "G": 1e9}[unit]
    # Both are printed with one decimal.
    rounding = 0.051 + 0.051 / float(milliseconds) * expected
    assert float(printed) == pytest.approx(expected, abs=rounding)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_layouts_train_alike_and_convert_alike(
    neox_checkout, token_data, tokenizer_file, reference, reference_at_start, tmp_path, tp, pp
):
    run, folder = reference
    start_from = tmp_path / "step0"
    convert(
        reshape_neox, neox_checkout,
        "--checkpoint", folder / "checkpoints", "--iteration", 0, "--output", start_from,
        "--tensor-parallel", tp, "--pipeline-parallel", pp,
    )  # fmt: skip

    # one model, two layouts: the same tensors, byte for byte
    one = reference_at_start
    other = export(neox_checkout, start_from, tmp_path / "hf_other", "--iteration", 0)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes(), name

    # the same weights train alike, and so does validation, during and after
    config = settings(
        token_data,
        tokenizer_file,
        tp,
        pp,
        load=str(start_from),
        finetune=True,
        save=str(tmp_path / "checkpoints"),
        checkpoint_factor=20,
        eval_interval=10,
        num_gpus=tp * pp,
    )
    layout = train(neox_checkout, config, tmp_path)
    assert layout.losses[1] == pytest.approx(run.losses[1], abs=1e-5)
    for step in range(2, 21):
        assert layout.losses[step] == pytest.approx(run.losses[step], abs=1e-3)
    assert len(run.validation_losses) == 3 and run.validation_losses == pytest.approx(
        layout.validation_losses, abs=1e-3
    )

    # the trained checkpoint is converted, and verified against the trained layers
    trained = export(neox_checkout, tmp_path / "checkpoints", tmp_path / "hf", "--verify")
    moved = trained["model.layers.0.token_mixer.aug_balance"]
    assert moved.abs().max() > 1e-3  # what starts at zero has learned


def test_a_new_model_of_two_ranks(neox_checkout, token_data, tokenizer_file, tmp_path):
    """The convolution, which all ranks have, stays identical, with dropout too. What GPT-NeoX saved
    is verified."""
    config = settings(
        token_data,
        tokenizer_file,
        tp=2,
        pp=1,
        save=str(tmp_path / "checkpoints"),
        checkpoint_factor=20,
        no_weight_tying=False,
        hidden_dropout=0.1,
    )
    train(neox_checkout, config, tmp_path)
    step = tmp_path / "checkpoints/global_step20"
    ranks = [torch.load(step / f"layer_02-model_0{rank}-model_states.pt") for rank in (0, 1)]
    assert torch.equal(ranks[0]["mixer.conv1d.weight"], ranks[1]["mixer.conv1d.weight"])
    assert not torch.equal(ranks[0]["mixer.aug_balance"], ranks[1]["mixer.aug_balance"])

    # in a checkout that is not linked to the plugin
    export(find_neox(), tmp_path / "checkpoints", tmp_path / "hf", "--verify", is_linked=False)

    # the best token of all ranks' shares of the vocabulary, with a tied head too
    config |= {"load": config.pop("save"), "finetune": True}
    assert_they_generate_alike(neox_checkout, config, tmp_path, tmp_path / "hf")
    assert_whole_form_generates_alike(neox_checkout, config, tmp_path)


def assert_whole_form_generates_alike(checkout: Path, config: dict, folder: Path) -> None:
    """The model of `config`, whose Hugging Face folder is `hf`, on two ranks without a pipeline."""
    whole = folder / "whole"
    convert(
        reshape_neox, checkout, "--checkpoint", config["load"], "--output", whole,
        "--tensor-parallel", 2, "--pipeline-parallel", 0,
    )  # fmt: skip
    layout = {"model_parallel_size": 2, "pipe_parallel_size": 0, "num_gpus": 2}
    config = {**config, **layout, "load": str(whole), "finetune": True}
    assert_they_generate_alike(checkout, config, folder, folder / "hf")


def assert_they_generate_alike(checkout: Path, config: dict, folder: Path, model_folder: Path):
    """NeoX's own generate.py and Hugging Face's generate continue a prompt greedily alike."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import megatron_patch.hf  # noqa: F401

    prompt = folder / "prompt.txt"
    prompt.write_text("import os")
    generation = dict(
        text_gen_type="input-file",
        sample_input_file=str(prompt),
        sample_output_file=str(folder / "continuation.jsonl"),
        maximum_tokens=12,
        temperature=0.0,
    )
    run = neox(checkout, "generate.py", {**config, **generation}, folder)
    assert run.returncode == 0, run.output[-4000:]
    answer = json.loads((folder / "continuation.jsonl").read_text())

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    inputs = tokenizer("import os", return_tensors="pt")
    output = model.generate(inputs.input_ids, max_new_tokens=12, do_sample=False)
    new = output[0, inputs.input_ids.shape[1] :]
    assert answer["text"] == tokenizer.decode(new, skip_special_tokens=True)


def test_the_reference_layout_converts_and_generates_alike(
    neox_checkout, token_data, tokenizer_file, reference, tmp_path, capsys
):
    checkpoints = reference[1] / "checkpoints"
    # in a checkout that is not linked to the plugin
    export(find_neox(), checkpoints, tmp_path / "hf", "--verify", is_linked=False)
    assert "verified largest logit difference" in capsys.readouterr().out
    config = settings(token_data, tokenizer_file, load=str(checkpoints))
    assert_they_generate_alike(neox_checkout, config, tmp_path, tmp_path / "hf")
    assert_whole_form_generates_alike(neox_checkout, config, tmp_path)


def test_a_killed_run_resumes_as_if_unbroken(neox_checkout, token_data, tokenizer_file, tmp_path):
    def config(name: str) -> dict:
        checkpoints = str(tmp_path / name)
        return settings(
            token_data,
            tokenizer_file,
            save=checkpoints,
            load=checkpoints,
            train_iters=40,
            checkpoint_factor=10,
        )

    unbroken = train(neox_checkout, config("unbroken"), tmp_path)
    process = start(neox_checkout, "train.py", config("killed"), tmp_path, start_new_session=True)
    for line in process.stdout:
        match = LOSS.search(line)
        if match and int(match[1]) >= 13:
            os.killpg(process.pid, signal.SIGKILL)
            break
    else:
        pytest.fail("the run ended before it could be killed")
    process.stdout.close()
    process.wait()
    resumed = train(neox_checkout, config("killed"), tmp_path)
    assert min(resumed.losses) > 1, "it started anew"
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(unbroken.losses[step], abs=1e-6)
    assert max(resumed.losses) == 40


def test_a_stopped_fine_tuning_goes_on(
    neox_checkout, token_data, tokenizer_file, reference, tmp_path
):
    """By the command that started it, on both data-parallel ranks, with dropout's random states."""

    def config(name: str, keep: int) -> dict:
        return settings(
            token_data,
            tokenizer_file,
            load=str(reference[1] / "checkpoints"),
            finetune=True,
            save=f"{tmp_path / name}/",
            train_iters=12,
            checkpoint_factor=6,
            keep_last_n_checkpoints=keep,
            hidden_dropout=0.1,
            train_micro_batch_size_per_gpu=2,
            num_gpus=2,
        )

    unbroken = train(neox_checkout, config("unbroken", 2), tmp_path)
    assert "goes on from there" not in unbroken.output
    assert sorted(unbroken.losses) == list(range(1, 13))
    shutil.copytree(tmp_path / "unbroken/global_step6", tmp_path / "stopped/global_step6")
    (tmp_path / "stopped/latest").write_text("global_step6")
    resumed = train(neox_checkout, config("stopped", 1), tmp_path)
    assert "MetaLA: save holds global_step6 of this run, which goes on from there" in resumed.output
    assert sorted(resumed.losses) == list(range(7, 13))
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(unbroken.losses[step], abs=1e-6)
    left = {path.name for path in (tmp_path / "stopped").iterdir()}
    assert "global_step12" in left and "global_step6" not in left
    assert (tmp_path / "stopped/latest").read_text() == "global_step12"


@pytest.mark.parametrize(
    ("tp", "pp", "changes"),
    [
        (1, 2, {"pos_emb": "none", "norm": "rmsnorm"}),
        (
            2,
            1,
            {
                "pos_emb": "rotary",
                "rotary_pct": 0.25,
                "num_kv_heads": 2,
                "mlp_multiple_of": 40,
                "use_bias_in_attn_linear": False,
            },
        ),
    ],
    ids=["pipeline, no positions", "two ranks, rotary, shared keys"],
)
def test_a_hybrid_trains_converts_and_generates_alike(
    neox_checkout, token_data, tokenizer_file, tmp_path, tp, pp, changes
):
    config = settings(
        token_data,
        tokenizer_file,
        tp,
        pp,
        num_layers=3,
        attention_config=[[["metala", "metala", "global"], 1]],
        save=str(tmp_path / "checkpoints"),
        checkpoint_factor=20,
        num_gpus=2,
        **changes,
    )
    run = train(neox_checkout, config, tmp_path)
    assert run.losses[20] < 0.8 * run.losses[1]
    export(neox_checkout, tmp_path / "checkpoints", tmp_path / "hf", "--verify")
    config |= {"load": config.pop("save")}
    assert_they_generate_alike(neox_checkout, config, tmp_path, tmp_path / "hf")


def logged_values(file: Path, name: str) -> dict[int, float]:
    """The values of one metric by step in a .wandb file: LevelDB's log format (blocks of 32 KiB,
    each fragment behind 4 bytes of checksum, 2 of length, 1 of type) around protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record, values = file.read_bytes(), 7, b"", {}
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        fragment = data[position + 7 : position + 7 + length]
        position += 7 + length
        record = fragment if kind in (1, 2) else record + fragment  # whole, first, middle, last
        if kind in (1, 4):
            history = Record.FromString(record).history
            for item in history.item:
                if (item.key or ".".join(item.nested_key)) == name:
                    values[history.step.num] = json.loads(item.value_json)
    return values


def test_wandb_offline_holds_the_loss_of_every_logged_step(reference):
    run, folder = reference
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    logged = logged_values(file, "train/lm_loss")
    assert logged == pytest.approx(run.losses, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metala": {"tua": 8}}, "metala.tua: unknown key, the known ones are tau"),
        ({"load": "/nowhere", "save": None}, "load: found no checkpoint in /nowhere"),
        ({"num_gpus": 2, "global_num_gpus": 4}, "global_num_gpus: found 4, wanted 2 (or none)"),
    ],
)
def test_mistakes_end_the_launcher_with_one_line(
    neox_checkout, token_data, tokenizer_file, tmp_path, changes, message
):
    config = settings(token_data, tokenizer_file, **changes)
    run = neox(neox_checkout, "train.py", config, tmp_path)
    assert run.returncode == 1
    assert run.output.splitlines()[-1].startswith(f"MetaLA: {message}")
    assert "Traceback" not in run.output
    assert "end of arguments" not in run.output  # GPT-NeoX's hundreds of lines
