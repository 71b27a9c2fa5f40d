"""Merging YAML files as GPT-NeoX does."""

from __future__ import annotations

import pytest
import yaml

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.yaml_config import merge_yaml, merge_yaml_texts, settle


def test_files_are_merged_and_dashes_are_underscores(tmp_path):
    (tmp_path / "a.yml").write_text('{"num-layers": 2, "optimizer": {"type": "Adam"}, # comment\n}')
    (tmp_path / "b.yml").write_text("seq_length: 32\nrms-norm-epsilon: 1.0e-6\n")
    (tmp_path / "empty.yml").write_text("# nothing\n")
    merged = merge_yaml([tmp_path / "a.yml", str(tmp_path / "b"), tmp_path / "empty"])
    assert merged == {
        "num_layers": 2,
        "optimizer": {"type": "Adam"},
        "seq_length": 32,
        "rms_norm_epsilon": 1e-6,
    }
    assert list(merged) == ["num_layers", "optimizer", "seq_length", "rms_norm_epsilon"]


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        ({"a": "x-y: 1", "b": "z: 1\nx_y: 2"}, "MetaLA: x_y: 2 of b stands, not 1 of a\n"),
        ({"a": "x_y: 1\nx-y: 2\nz: 1"}, "MetaLA: x_y: 2 of a stands, not 1 of a\n"),
    ],
)
def test_the_last_value_of_a_key_stands_and_is_said(texts, line, capsys):
    assert merge_yaml_texts(texts) == {"x_y": 2, "z": 1}
    assert capsys.readouterr() == ("", line)


def test_settled_files_have_each_key_once_in_any_order(capsys):
    texts = {"a": "x-y: 1\nz: 1 # one", "b": "{'x_y': {'p': 2}}", "c": "# mine\nw: 3\n"}
    settled = settle(texts)
    assert merge_yaml_texts(dict(reversed(settled.items()))) == {"x_y": {"p": 2}, "z": 1, "w": 3}
    assert capsys.readouterr() == ("", "")
    assert list(settled) == list(texts)
    assert yaml.safe_load(settled["a"]) == {"z": 1}
    assert settled["b"] == texts["b"] and settled["c"] == texts["c"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a": "- 1"}, "a: found a sequence, wanted a mapping of settings"),
        ({"a": "just text"}, "a: found a scalar, wanted a mapping of settings"),
        ({"a": "{'x': "}, "a: not YAML: "),
        ({"a": "x: !!python/name:os.system"}, "a: not YAML: "),
    ],
)
def test_what_is_wrong_is_said_in_a_line(texts, message):
    with pytest.raises(SettingsError) as error:
        merge_yaml_texts(texts)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_unreadable_and_repeated_files(tmp_path):
    with pytest.raises(SettingsError, match=r"no-such.yml: cannot be read: .*No such file"):
        merge_yaml([tmp_path / "no-such"])
    (tmp_path / "a.yml").write_text("x: 1")
    with pytest.raises(SettingsError, match="a.yml: the file is given twice"):
        merge_yaml([tmp_path / "a.yml", tmp_path / "a"])
    (tmp_path / "b.yml").write_bytes(b"\xff\xff: 1")
    with pytest.raises(SettingsError, match="b.yml: cannot be read"):
        merge_yaml([tmp_path / "b.yml"])
