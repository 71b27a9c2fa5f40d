"""Reshaping from one layout to another and back, bit for bit, against an independent writer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from convert.command import ConvertError
from convert.neox_reader import NeoXCheckpoint
from convert.neox_to_hf import neox_to_hf
from convert.neox_writer import adapt_configs
from convert.reshape_neox import main, reshape_neox
from megatron_patch.hf import MetaLAForCausalLM
from tests.convert.conftest import write_tokenizer
from tests.convert.synthetic import TOKENS, Model, rank_layers, write

LAYOUTS = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 2, 3]))


def read(folder: Path, tp: int, pp: int, rank: int) -> dict[int, dict[str, torch.Tensor]]:
    """Reads a rank's layers without the converter."""
    step = folder / (folder / "latest").read_text()
    layers: dict[int, dict[str, torch.Tensor]] = {}
    if pp:
        for file in step.glob(f"layer_*-model_{rank:02d}-model_states.pt"):
            layers[int(file.name[6:8])] = torch.load(file)
        return layers
    for name, tensor in torch.load(step / f"mp_rank_{rank:02d}_model_states.pt")["module"].items():
        index, own_name = name.removeprefix("sequential.").split(".", 1)
        layers.setdefault(int(index), {})[own_name] = tensor
    return layers


def assert_holds(folder: Path, model: Model, hf: dict[str, torch.Tensor], tp: int, pp: int) -> None:
    for rank in range(tp):
        found = read(folder, tp, pp, rank)
        wanted = rank_layers(model, hf, tp, rank)
        if not pp:
            wanted = {index: layer for index, layer in wanted.items() if layer}
        assert found.keys() == wanted.keys()
        for index, layer in wanted.items():
            assert found[index].keys() == layer.keys()
            for name, tensor in layer.items():
                where = f"rank {rank}, layer {index}: {name}"
                assert found[index][name].dtype == tensor.dtype, where
                assert torch.equal(found[index][name], tensor), where
                storage = found[index][name].untyped_storage().nbytes()
                assert storage == tensor.nbytes, where  # no file carries the whole tensor


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    source=LAYOUTS,
    target=LAYOUTS,
    model=st.builds(
        Model,
        layers=st.just(3),
        tied=st.booleans(),
        norm=st.sampled_from(["simplermsnorm", "rmsnorm"]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        tokens=st.integers(60, 130),
        attention=st.sampled_from([(), (1,), (0, 2)]),
        kv_heads=st.sampled_from([2, 4]),
        bias=st.booleans(),
    ),
)
def test_there_and_back(source, target, model):
    assume(not model.attention or model.kv_heads % max(source[0], target[0]) == 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab_file = write_tokenizer(folder / "tokenizer.json", (), model.tokens)
        hf = write(folder / "source", model, *source, vocab_file)

        reshape_neox(folder / "source", folder / "target", *target)
        assert_holds(folder / "target", model, hf, *target)

        reshape_neox(folder / "target", folder / "back", *source)
        assert_holds(folder / "back", model, hf, *source)


@pytest.mark.parametrize(("tp", "pp"), [(2, 0), (2, 3)])
def test_deepspeed_finds_what_it_reads(tp, pp, vocab_file, tmp_path):
    write(tmp_path / "neox", Model(layers=3, tied=True), 1, 0, vocab_file, iteration=12)
    written = reshape_neox(tmp_path / "neox", tmp_path / "new", tp, pp)
    assert (tmp_path / "new/latest").read_text() == "global_step12"
    step = tmp_path / "new/global_step12"
    ranks = tp * max(pp, 1)
    assert len(list(step.glob("mp_rank_*"))) == ranks
    for file in step.glob("mp_rank_*"):
        states = torch.load(file)
        assert states["mp_world_size"] == ranks and states["dp_world_size"] == 1
        assert states["iteration"] == 12 and states["args"]["model_parallel_size"] == tp
        assert states["args"]["padded_vocab_size"] == written.shape.padded_vocab_size == 96
        assert (states["module"] is None) == bool(pp)
    # The norm has a file even without tensors; functions and the tied head have none.
    layers = {int(file.name[6:8]) for file in step.glob("layer_*")}
    assert layers == ({0, 2, 3, 4, 6} if pp else set())
    assert written.settings["model_parallel_size"] == tp
    assert written.settings["pipe_parallel_size"] == pp


def test_configs_keep_their_comments():
    configs = {
        "a.yml": '# sizes\n{"num_layers": 2,  # few\n  "pipe-parallel-size": 1,\n}\n',
        "b.yml": "model_parallel_size: 1 # ranks\n",
    }
    assert adapt_configs(configs, 4, 2) == {
        "a.yml": '# sizes\n{"num_layers": 2,  # few\n  "pipe-parallel-size": 2,\n}\n',
        "b.yml": "model_parallel_size: 4 # ranks\n",
    }
    zero = {"zero_optimization": {"stage": 1, "overlap_comm": True}}
    text = "zero_optimization: {stage: 3, overlap_comm: true}  # memory\n"
    changed = adapt_configs(configs | {"c.yml": text}, 4, 2, zero)
    assert changed["c.yml"] == text.replace("3", "1")
    # Missing keys are added, and a file that cannot be changed in place is dumped again.
    changed = adapt_configs({"a.yml": "{num_layers: 2, pipe_parallel_size: 1}"}, 4, 2)
    assert yaml.safe_load(changed["a.yml"]) == {
        "num_layers": 2,
        "pipe_parallel_size": 2,
        "model_parallel_size": 4,
    }


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (3, 0, "tensor parallel 3 does not divide num_attention_heads, 4"),
        (0, 0, "must be at least 1"),
        (1, -1, "must be at least 1, pipeline parallel at least 0"),
        (1, 3, "pipeline parallel 3: the model has only 2 layers"),
    ],
)
def test_layouts_that_cannot_be(tp, pp, message, vocab_file, tmp_path):
    write(tmp_path / "neox", Model(), 1, 0, vocab_file)
    with pytest.raises(ConvertError, match=message):
        reshape_neox(tmp_path / "neox", tmp_path / "new", tp, pp)
    assert [p.name for p in tmp_path.iterdir()] == ["neox"]


def test_key_heads_must_be_divided(vocab_file, tmp_path):
    write(tmp_path / "neox", Model(attention=(1,), kv_heads=2), 1, 0, vocab_file)
    with pytest.raises(ConvertError, match="tensor parallel 4 does not divide num_kv_heads, 2"):
        reshape_neox(tmp_path / "neox", tmp_path / "new", 4, 1)


def test_the_vocabulary_needs_its_tokenizer_where_the_padding_could_change(vocab_file, tmp_path):
    write(tmp_path / "neox", Model(), 2, 0, tmp_path / "gone.json")
    reshape_neox(tmp_path / "neox", tmp_path / "same", 2, 1)
    with pytest.raises(ConvertError, match="gone.json of the settings is not there"):
        reshape_neox(tmp_path / "neox", tmp_path / "new", 4, 1)
    other = write_tokenizer(tmp_path / "other.json", (), tokens=40)
    with pytest.raises(ConvertError, match="40 tokens, which do not give .* 96 rows"):
        reshape_neox(tmp_path / "neox", tmp_path / "new", 4, 1, tokenizer=other)
    reshape_neox(tmp_path / "neox", tmp_path / "new", 4, 1, tokenizer=vocab_file)
    assert NeoXCheckpoint(tmp_path / "new").shape.padded_vocab_size == 96


def neox_rows(written: NeoXCheckpoint, tokens: int) -> int:
    """Returns the rows that GPT-NeoX makes from the settings written, by its own loop."""
    multiple = written.settings["make_vocab_size_divisible_by"] * written.tensor_parallel
    while tokens % multiple:
        tokens += 1
    return tokens


@pytest.mark.parametrize(
    ("divisible_by", "layouts"), [(24, (1, 4, 1)), (16, (4, 1, 2)), (128, (1, 2, 4))]
)
def test_no_layout_changes_the_loss(divisible_by, layouts, vocab_file, tmp_path, capfd):
    """Padding rows count in the loss, so all layouts must have the same ones."""
    model = Model(divisible_by=divisible_by)
    hf = write(tmp_path / "0", model, layouts[0], 0, vocab_file)
    rows = hf["lm_head.weight"].shape[0]
    for i, tp in enumerate(layouts[1:]):
        written = reshape_neox(tmp_path / str(i), tmp_path / str(i + 1), tp, 1)
        assert written.shape.padded_vocab_size == neox_rows(written, TOKENS) == rows
        assert_holds(tmp_path / str(i + 1), model, hf, tp, 1)
        found = written.settings["make_vocab_size_divisible_by"]
        told = f"the settings written have make_vocab_size_divisible_by: {found}"
        before = NeoXCheckpoint(tmp_path / str(i)).settings["make_vocab_size_divisible_by"]
        assert (told in capfd.readouterr().err) == (found != before)
    neox_to_hf(tmp_path / "0", tmp_path / "one", keep_vocab_padding=True)
    neox_to_hf(tmp_path / "2", tmp_path / "other", keep_vocab_padding=True)
    one, other = (
        MetaLAForCausalLM.from_pretrained(tmp_path / name)(
            **dict.fromkeys(("input_ids", "labels"), torch.arange(TOKENS)[None])
        ).loss
        for name in ("one", "other")
    )
    assert torch.equal(one, other)


def test_rows_that_must_be_added_are_told(tmp_path, capfd):
    vocab_file = write_tokenizer(tmp_path / "tokenizer.json", (), tokens=91)
    write(tmp_path / "neox", Model(tokens=91, divisible_by=1), 1, 0, vocab_file)
    written = reshape_neox(tmp_path / "neox", tmp_path / "new", 2, 0)
    assert written.shape.padded_vocab_size == neox_rows(written, 91) == 92
    assert "note: 1 new vocabulary rows of zeros" in capfd.readouterr().err
    head = read(tmp_path / "new", 2, 0, 1)[6]["final_linear.weight"]
    assert head.shape == (46, 32) and not head[-1].any() and head[:-1].any(dim=1).all()


@pytest.mark.parametrize(
    ("stage", "tp", "pp", "written"),
    [(3, 1, 0, 1), (3, 2, 1, 1), (2, 1, 0, 2), (2, 1, 1, 1), (1, 2, 0, 1)],
)
def test_the_stage_written_can_load_what_is_written(
    stage, tp, pp, written, vocab_file, tmp_path, capfd
):
    zero = {"zero_optimization": {"stage": stage, "overlap_comm": True}}
    write(tmp_path / "neox", Model(layers=1, settings=zero), 1, 0, vocab_file)
    found = reshape_neox(tmp_path / "neox", tmp_path / "new", tp, pp).settings["zero_optimization"]
    assert found == {"stage": written, "overlap_comm": True}
    assert ("zero_optimization: stage 1;" in capfd.readouterr().err) == (stage != written)


def split_settings(folder: Path, vocab_file: Path, names: tuple[str, str]) -> list[Path]:
    """Writes a checkpoint's settings to two files, `metala:` to the first."""
    rest = Model().yaml(1, 0, vocab_file)
    files = [folder / name for name in names]
    for file, values in zip(
        files, ({"metala": {**rest.pop("metala"), "tau": 8.0}}, rest), strict=True
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(values))
    return files


def test_all_the_configs_that_are_given_are_written(vocab_file, tmp_path):
    write(tmp_path / "neox", Model(), 1, 0, vocab_file)
    files = split_settings(tmp_path, vocab_file, ("a/one.yml", "b/two.yml"))
    given = [file.with_suffix("") for file in files]  # as on GPT-NeoX's command line
    written = reshape_neox(tmp_path / "neox", tmp_path / "new", 1, 1, config=given)
    assert written.settings["metala"]["tau"] == 8
    assert sorted(p.name for p in (written.step / "configs").iterdir()) == ["one.yml", "two.yml"]

    files = split_settings(tmp_path, vocab_file, ("a/run.yml", "b/run.yml"))
    with pytest.raises(ConvertError, match="--config: found two files named run.yml"):
        reshape_neox(tmp_path / "neox", tmp_path / "other", 1, 1, config=files)
    assert not (tmp_path / "other").exists()


def test_settings_in_json_are_read(vocab_file, tmp_path):
    """GPT-NeoX accepts JSON files, and keeps them in the checkpoint with the YAML files."""
    files = split_settings(tmp_path, vocab_file, ("model.json", "rest.yml"))
    configs = {file.name: file.read_text() for file in files}
    write(tmp_path / "neox", Model(), 1, 0, vocab_file, configs=configs)
    assert NeoXCheckpoint(tmp_path / "neox").settings["metala"]["tau"] == 8
    assert NeoXCheckpoint(tmp_path / "neox", config=files).settings["metala"]["tau"] == 8


def test_the_folder_one_stands_in_can_be_written(vocab_file, tmp_path, monkeypatch):
    write(tmp_path / "neox", Model(), 1, 0, vocab_file)
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    assert reshape_neox(tmp_path / "neox", Path(), 1, 1).iteration == 7


def test_the_command(run_main, vocab_file, tmp_path):
    write(tmp_path / "neox", Model(), 1, 0, vocab_file)
    flags = ["--checkpoint", tmp_path / "neox", "--output", tmp_path / "new"]
    flags += ["--tensor-parallel", 2, "--pipeline-parallel", 1]
    process = run_main(main, *flags)
    assert process.returncode == 0, process.stderr
    assert "finetune: true" in process.stdout
    process = run_main(main, *flags)
    assert process.returncode == 1
    assert (
        process.stderr == f"command: {tmp_path / 'new'} exists already; --overwrite replaces it\n"
    )
