"""setup.sh finds, clones and links GPT-NeoX, or prints a line that says why not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEOX_FILES = ("deepy.py", "train.py", "megatron/__init__.py", "megatron/model/gpt2_model.py")


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.hooksPath="]
    result = subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


@pytest.fixture
def origin(tmp_path):
    """A git repository with the files by which GPT-NeoX is recognised."""
    folder = tmp_path / "origin"
    for name in NEOX_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("# GPT-NeoX\n")
    (folder / "configs").mkdir()
    (folder / "configs" / "one.yml").touch()
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "one")
    return folder


@pytest.fixture
def set_up(tmp_path, origin):
    """Function: runs a copy of setup.sh in an environment with all packages; `origin` is its
    GPT-NeoX."""
    if not shutil.which("make") or not shutil.which("g++"):
        pytest.skip("setup.sh wants a compiler for GPT-NeoX")
    copy = tmp_path / "repository"
    for name in ("scripts", "configs", "megatron_patch/commands"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True)
    for name in ("constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, copy)
    link = copy / "megatron_patch/commands/link_neox.py"
    commit = git(origin, "rev-parse", "HEAD")
    link.write_text(re.sub('TESTED_COMMIT = ".*"', f'TESTED_COMMIT = "{commit}"', link.read_text()))

    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    sums = subprocess.run(
        f'cd "{copy}" && cat constraints.txt setup.py scripts/setup.sh | cksum',
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    (environment / ".metala-set-up").write_text(f"{sums.stdout.strip()} {copy}\nyes\n")

    def run(url=f"file://{origin}", **variables):
        variables = {"VIRTUAL_ENV": str(environment), "GPT_NEOX_URL": url, **variables}
        inherited = {k: v for k, v in os.environ.items() if k != "GPT_NEOX_PATH"}
        result = subprocess.run(
            [copy / "scripts" / "setup.sh"],
            env={**inherited, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result, copy / "third_party" / "gpt-neox"

    return run


def test_clones_links_and_reuses(set_up, origin):
    part = origin.parent / "repository" / "third_party" / "gpt-neox.part"
    part.mkdir(parents=True)  # an interrupted clone leaves it
    result, clone = set_up()
    assert result.returncode == 0, result.stderr
    assert f"{clone}: linked" in result.stdout
    assert f"engine {clone}" in result.stdout
    assert "register_metala()" in (clone / "megatron" / "__init__.py").read_text()
    assert not part.exists()
    again, _ = set_up(url="file:///nowhere")
    assert f"{clone}: already linked" in again.stdout


def test_an_unreachable_clone_means_the_trainer(set_up):
    result, clone = set_up(url="file:///nowhere")
    assert result.returncode == 0, result.stderr
    assert "Hugging Face Trainer: cannot clone file:///nowhere" in result.stdout
    assert result.stdout.rstrip().endswith("engine Hugging Face Trainer")
    assert not clone.exists()


def test_a_checkout_that_is_named(set_up, origin):
    result, clone = set_up(url="file:///nowhere", GPT_NEOX_PATH=str(origin))
    assert result.returncode == 0, result.stderr
    assert f"{origin}: linked" in result.stdout and not clone.exists()
    wrong, _ = set_up(GPT_NEOX_PATH="/nowhere")
    assert wrong.returncode == 1 and "GPT_NEOX_PATH: no folder /nowhere" in wrong.stderr
    other, _ = set_up(GPT_NEOX_PATH=str(origin.parent))
    assert other.returncode == 1 and "is not a GPT-NeoX checkout" in other.stderr


def test_the_trainer_can_be_asked_for(set_up):
    result, clone = set_up(METALA_ENGINE="trainer")
    assert "Hugging Face Trainer, as METALA_ENGINE says" in result.stdout
    assert not clone.exists()
    wrong, _ = set_up(METALA_ENGINE="Trainer")
    line = "set-up: METALA_ENGINE: found Trainer, wanted trainer or nothing\n"
    assert wrong.returncode == 1 and wrong.stderr == line and not wrong.stdout


@pytest.mark.parametrize("script", ["setup.sh", "quickstart.sh"])
def test_unknown_arguments_are_refused_before_anything_is_done(script):
    result = subprocess.run([ROOT / "scripts" / script, "--frish"], capture_output=True, text=True)
    assert result.returncode and not result.stdout
    assert "found --frish, wanted" in result.stderr and result.stderr.count("\n") == 1


def test_what_could_not_be_installed_is_tried_again(set_up, tmp_path):
    """The first time there was no network, or no compiler."""
    stamp, python = (tmp_path / "environment" / name for name in (".metala-set-up", "bin/python"))
    stamp.write_text(stamp.read_text().replace("yes", "no"))
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] || exec "{sys.executable}" "$@"\n')
    result, clone = set_up(METALA_ENGINE="trainer")
    assert result.stdout.rstrip().endswith("engine Hugging Face Trainer")
    assert stamp.read_text().endswith("no\n")
    result, clone = set_up()
    assert f"engine {clone}" in result.stdout
    assert stamp.read_text().endswith("yes\n")
