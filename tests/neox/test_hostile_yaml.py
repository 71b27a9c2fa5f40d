"""Files of settings that are none: one line that names the file, in bounded time."""

from __future__ import annotations

import os
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.yaml_config import merge_yaml, merge_yaml_texts, settle

LAUGHS = "\n".join(
    ["a: &a0 [x, x, x]"]
    + [f"b{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
)
MERGES = "\n".join(
    ["a: &m0 {x: 1}"]
    + [f"b{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}], y{i}: 1}}" for i in range(1, 40)]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: 1\0", "not YAML: "),
        ("\ud800: 1", "not YAML: "),
        ("x: 2024-13-45", "not YAML: month must be in 1..12"),
        ("x: !!int abc", "not YAML: invalid literal for int"),
        ("x: !!timestamp abc", "not YAML: "),
        ("x: !!bool abc", "not YAML: 'abc'"),
        ("x: " + "9" * 5000, "found a number of 5000 digits"),
        ("x: " + "[" * 20_000, "not YAML: "),
        ("x: {[1]: 2}", "not YAML: "),
        ("x: &a [*a]", "not YAML of settings: a value holds itself"),
        ("x: &a {y: *a}", "not YAML of settings: a value holds itself"),
        (LAUGHS, "found more than 100,000 values, aliases included"),
        (MERGES, "found more than 100,000 values, aliases included"),
    ],
)
def test_texts(text, message):
    start = time.process_time()
    for read in (merge_yaml_texts, settle):
        with pytest.raises(SettingsError, match=f"^run.yml: {message}") as error:
            read({"run.yml": text})
        assert "\n" not in str(error.value)
    assert time.process_time() - start < 5


def test_files(tmp_path):
    (tmp_path / "loop.yml").symlink_to("loop.yml")
    (tmp_path / "folder.yml").mkdir()
    os.mkfifo(tmp_path / "pipe.yml")
    (tmp_path / "zero.yml").symlink_to("/dev/zero")
    with open(tmp_path / "huge.yml", "wb") as file:
        file.truncate(2**36)  # without a byte on the disk
    for name, message in {
        "loop": "cannot be read: a link that leads to itself",
        "folder": "cannot be read: no regular file",
        "pipe": "cannot be read: no regular file",
        "zero": "cannot be read: no regular file",
        "huge": "cannot be read: more than 1 MB of text",
        "x" * 300: "cannot be read: .*name too long",
        "a\0b": "cannot be read: a name with a NUL",
    }.items():
        shown = f"{tmp_path}/{name}.yml".replace("\0", " ")  # as a terminal can show it
        with pytest.raises(SettingsError, match=f"^{shown}: {message}") as error:
            merge_yaml([tmp_path / name])
        assert "\n" not in str(error.value)


def test_aliases_and_merge_keys_that_settings_use():
    text = "a: &a {lr: 1, b: 2}\nc: {<<: *a, b: 3}\nd: [*a, *a]"
    merged = merge_yaml_texts({"run.yml": text})
    assert merged["c"] == {"lr": 1, "b": 3} and merged["d"] == [merged["a"]] * 2


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=8,
)
PARTS = st.sampled_from(
    ["a: ", "- ", "&x ", "*x ", "<<: ", "!!int ", "!!float ", "!!timestamp ", "!!set ", "!!omap "]
    + ["!!binary ", "? ", "| ", "{", "}", "[", "]", "\n", "  ", "1", "'", '"', "---\n"]
    + ["%YAML 1.1\n", "~", ".inf"]
    + ["2024-02-31", "1:70:1", "0x", "0b_", "\t", "#", "!!python/name:os.system "]
)  # fmt: skip


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    raw=st.lists(PARTS, max_size=12).map(lambda parts: "".join(parts).encode())
    | VALUES.map(lambda value: yaml.safe_dump(value).encode())
    | st.binary(max_size=30)
)
def test_any_file_is_read_or_refused_in_a_line(tmp_path, raw):
    path = tmp_path / "run.yml"
    path.write_bytes(raw)
    try:
        merged = merge_yaml([path])
    except SettingsError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        assert all(isinstance(key, str) for key in merged)
        settle({"run.yml": raw.decode()})
