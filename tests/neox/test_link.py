"""`scripts/link_neox.py` adds its line once, takes it away without a trace, and knows GPT-NeoX."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "link_neox.py"


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in ("deepy.py", "train.py", "megatron/__init__.py", "megatron/model/gpt2_model.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import torch  # as it was")
    (tmp_path / "configs").mkdir()
    return tmp_path


def link(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_links_once_and_unlinks_without_a_trace(checkout):
    before = contents(checkout)
    assert "linked" in link(checkout).stdout
    once = contents(checkout)
    assert "already linked" in link(checkout).stdout
    assert contents(checkout) == once
    init = (checkout / "megatron/__init__.py").read_text()
    assert init.count("from megatron_patch.neox import register") == 1
    assert (checkout / "configs/metala.yml").read_text().startswith("# MetaLA 0.38B")
    assert "unlinked" in link(checkout, "--unlink").stdout
    after = contents(checkout)
    init = str(checkout / "megatron/__init__.py")
    assert after.pop(init) == before.pop(init) + b"\n"  # a line ending where there was none
    assert after == before
    assert "already unlinked" in link(checkout, "--unlink").stdout


def test_linking_again_replaces_the_line_of_an_earlier_version(checkout):
    init = checkout / "megatron/__init__.py"
    link(checkout)
    linked = init.read_text()
    old = "import megatron_patch.neox; megatron_patch.neox.register()"
    init.write_text(f"import torch  # as it was\n{old}  # MetaLA plugin, added by link_neox.py\n")
    assert ": linked" in link(checkout).stdout
    assert init.read_text() == linked
    link(checkout, "--unlink")
    assert init.read_text() == "import torch  # as it was\n"


def test_another_package_of_the_name_lets_neox_start(checkout, tmp_path):
    """One line, from the first rank alone, says that and where."""
    other = tmp_path / "other/megatron_patch"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    (checkout / "megatron/__init__.py").write_text("started = True\n")
    link(checkout)
    said = []
    for rank in ("0", "1"):
        process = subprocess.run(
            # without site-packages, where this package may be installed
            [sys.executable, "-S", "-c", "import megatron; print(megatron.started)"],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(other.parent), "RANK": rank},
            capture_output=True,
            text=True,
        )
        assert process.stdout == "True\n", process.stderr
        said.append(process.stderr.splitlines())
    (line,), silence = said
    assert silence == []
    assert line.startswith("MetaLA: not loaded, runs with metala layers will be refused: ")
    assert line.endswith(f"(megatron_patch found in {other})")


def test_says_which_commit_it_was_tested_with(checkout):
    assert "tested with ea7aefd8" in link(checkout).stdout


def test_refuses_a_folder_that_is_not_neox(tmp_path):
    process = link(tmp_path)
    assert process.returncode == 1
    assert process.stderr.strip() == (
        f"link_neox.py: {tmp_path} is not a GPT-NeoX checkout: it has no deepy.py"
    )
    assert not list(tmp_path.iterdir())


def test_keeps_a_configuration_of_the_users_own(checkout):
    (checkout / "configs/metala.yml").write_text("mine")
    link(checkout)
    link(checkout, "--unlink")
    assert (checkout / "configs/metala.yml").read_text() == "mine"
