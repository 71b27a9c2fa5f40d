"""The installed commands: each one exists, names itself in its errors, and finds its files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest

from megatron_patch.commands import link_neox

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("convert", "import", "link", "prepare-data", "reshape", "train")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with egg-info and what a wheel would hold."""
    folder = tmp_path_factory.mktemp("built")
    command = ["setup.py", "-q", "egg_info", "-e", folder, "build", "-b", folder]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    return folder


@pytest.fixture
def entry_points(built) -> dict[str, str]:
    parser = ConfigParser()
    parser.read(built / "metala_neox.egg-info/entry_points.txt")
    return dict(parser["console_scripts"])


def test_there_are_commands(entry_points):
    assert sorted(entry_points) == [f"metala-{name}" for name in COMMANDS]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_function(entry_points, name):
    module, function = entry_points[f"metala-{name}"].split(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("name", ["link", "prepare-data", "train"])
def test_errors_name_the_command(entry_points, name, monkeypatch, capsys):
    module, function = entry_points[f"metala-{name}"].split(":")
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/metala-{name}"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        getattr(import_module(module), function)()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"metala-{name}: the following arguments are required: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["link_neox.py", "prepare_data.py"])
def test_errors_name_the_script(run_script, name):
    result = run_script(name)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{name}: the following arguments are required: ")
    assert result.stderr.count("\n") == 1


def test_configurations_are_installed_with_the_package(built):
    """There link_neox.py looks first."""
    installed = {path.name for path in built.glob("lib*/megatron_patch/configs/*.yml")}
    assert installed == {path.name for path in (ROOT / "configs").glob("*.yml")}
    package = next(built.glob("lib*"))
    code = "from megatron_patch.commands.link_neox import CONFIGS; print(CONFIGS)"
    run = {"cwd": package, "capture_output": True, "text": True, "env": {"PYTHONPATH": package}}
    result = subprocess.run([sys.executable, "-c", code], **run)
    assert Path(result.stdout.strip()) == package.resolve() / "megatron_patch/configs"
    shutil.rmtree(package / "megatron_patch/configs")
    result = subprocess.run([sys.executable, "-c", code], **run)
    assert Path(result.stdout.strip()) == package.resolve() / "configs"


def test_missing_configurations_are_one_line(run_command, monkeypatch, tmp_path):
    for name in ("deepy.py", "train.py", "megatron/__init__.py", "megatron/model/gpt2_model.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(link_neox, "CONFIGS", tmp_path / "nowhere")
    result = run_command("link_neox.py", tmp_path)
    assert result.returncode == 1 and not (tmp_path / "megatron/__init__.py").read_text()
    wanted = f"found no metala*.yml in {tmp_path}/nowhere, wanted MetaLA's configurations"
    assert result.stderr == f"link_neox.py: {wanted}\n"
