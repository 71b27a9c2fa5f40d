"""link_neox.py adds its lines once, removes them without a trace, and knows GPT-NeoX."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch.commands import link_neox

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in ("deepy.py", "train.py", "megatron/__init__.py", "megatron/model/gpt2_model.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import torch  # as it was")
    (tmp_path / "configs").mkdir()
    return tmp_path


@pytest.fixture
def link(run_command):
    """Function: runs link_neox.py in this process."""
    return lambda *arguments: run_command("link_neox.py", *arguments)


def contents(folder: Path) -> dict[str, tuple]:
    """Returns mode, owner and content of every file, and the target of every link."""
    return {
        str(p): (
            p.lstat().st_mode,
            p.lstat().st_uid,
            os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None,
        )
        for p in folder.rglob("*")
    }


def test_links_once_and_unlinks_without_a_trace(checkout, link):
    before = contents(checkout)
    assert "linked" in link(checkout).stdout
    once = contents(checkout)
    assert "already linked" in link(checkout).stdout
    assert contents(checkout) == once
    init = (checkout / "megatron/__init__.py").read_text()
    assert init.count("from megatron_patch.neox import register") == 1
    assert (checkout / "configs/metala.yml").read_text().startswith("# MetaLA 0.38B")
    assert "unlinked" in link(checkout, "--unlink").stdout
    assert contents(checkout) == before
    assert "already unlinked" in link(checkout, "--unlink").stdout


def test_another_package_of_the_name_lets_neox_start(checkout, tmp_path, link):
    """Only the first rank prints a line, which names the other package."""
    other = tmp_path / "other/megatron_patch"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    (checkout / "megatron/__init__.py").write_text("started = True\n")
    link(checkout)
    said = []
    for rank in ("0", "1"):
        process = subprocess.run(
            # -S: without site-packages, where this package may be installed
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


def test_says_which_commit_it_was_tested_with(checkout, link):
    assert "tested with ea7aefd8" in link(checkout).stdout


def test_refuses_a_folder_that_is_not_neox(tmp_path, link):
    process = link(tmp_path)
    assert process.returncode == 1
    assert process.stderr.strip() == (
        f"link_neox.py: {tmp_path} is not a GPT-NeoX checkout: it has no deepy.py"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [b"", b"x = 1", b"x = 1\n", b"x = 1\r\n", b"x = 1\r\ny = 2", b"x = 1\n\n\n", b"x = 1\r"]
    + [b"# -*- coding: latin-1 -*-\nx = '\xe9'", b"\xef\xbb\xbfx = 1\n\x0c\ny = '\xc2\x85'\n"],
)
def test_every_byte_mode_and_link_is_as_before(checkout, content, link):
    """A linked file still compiles, and linking twice is the same as once."""
    init = checkout / "megatron/__init__.py"
    (checkout / "megatron/real.py").write_bytes(content)
    (checkout / "megatron/real.py").chmod(0o640)
    init.unlink()
    init.symlink_to("real.py")
    before = contents(checkout)
    for _ in range(2):
        assert link(checkout).returncode == 0
        assert init.is_symlink() and init.stat().st_mode & 0o777 == 0o640
        compile(init.read_bytes(), "init", "exec")
    assert link(checkout, "--unlink").returncode == 0
    assert contents(checkout) == before


def test_what_is_the_users_own_stays_and_is_said(checkout, tmp_path_factory, link):
    """The user has files, links to other files, a broken link, and the very link we would make."""
    mine = tmp_path_factory.mktemp("mine")
    (mine / "metala_3b.yml").write_text("mine")
    configs = checkout / "configs"
    (configs / "metala.yml").write_text("mine")
    (configs / "metala_3b.yml").symlink_to(mine / "metala_3b.yml")
    (configs / "metala_1b.yml").symlink_to("/not/mounted/metala_1b.yml")
    (configs / "metala_tiny.yml").symlink_to(ROOT / "configs/metala_tiny.yml")
    before = contents(checkout)
    for _ in range(2):
        said = link(checkout).stdout
        for name in ("metala.yml", "metala_3b.yml", "metala_1b.yml", "metala_tiny.yml"):
            assert f"  configs/{name} is your own and stays; MetaLA's is " in said
        assert "metala_380m" not in said
    link(checkout, "--unlink")
    assert contents(checkout) == before


@pytest.fixture
def clone(tmp_path_factory) -> Path:
    """Another clone of the plugin, with one more configuration."""
    folder = tmp_path_factory.mktemp("clone é") / "clone"
    for name in ("megatron_patch/commands", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "architecture.py"):
        shutil.copy(ROOT / "megatron_patch" / name, folder / "megatron_patch")
    shutil.copytree(ROOT / "configs", folder / "configs", symlinks=True)
    (folder / "configs/metala_new.yml").write_text("new")
    return folder


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_checkout_that_another_clone_has_linked(checkout, clone, is_gone, link):
    """Linking again takes this clone's configurations; either clone can unlink."""
    before = contents(checkout)
    configs = checkout / "configs"

    def link_in_clone(*arguments):
        return subprocess.run(
            [sys.executable, clone / "scripts/link_neox.py", *arguments],
            env={**os.environ, "PYTHONPATH": str(clone)},
            capture_output=True,
            text=True,
        )

    for undo in (link, link, link_in_clone):
        if not clone.exists():
            break
        assert link_in_clone(checkout).returncode == 0
        assert os.readlink(configs / "metala.yml") == str(clone / "configs/metala.yml")
        if is_gone:
            shutil.rmtree(clone)
        if undo is link:
            assert ": linked" in link(checkout).stdout
            assert (configs / "metala.yml").resolve().parent == ROOT / "configs"
            assert not os.path.lexists(configs / "metala_new.yml")
        assert ": unlinked" in undo(checkout, "--unlink").stdout
        assert contents(checkout) == before


@pytest.mark.parametrize("part", ["lines", "links"])
@pytest.mark.parametrize("options", [[], ["--unlink"]])
def test_what_cannot_be_done_is_not_half_done(checkout, part, options, monkeypatch, link):
    """Failing calls act as a read-only folder, because root, who may run the tests, can write."""
    if options:
        link(checkout)
    before = contents(checkout)

    def fail(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    calls = []

    def fail_third(path, *rest, call=link_neox.set_link):
        calls.append(path)
        return fail(path) if len(calls) == 3 else call(path, *rest)

    if part == "lines":
        monkeypatch.setattr(link_neox, "write", fail)
    else:
        monkeypatch.setattr(link_neox, "set_link", fail_third)
    with pytest.raises(PermissionError):
        (link_neox.unlink if options else link_neox.link)(checkout)
    assert contents(checkout) == before


def test_a_checkout_without_a_folder_of_configurations(checkout, link):
    (checkout / "configs").rmdir()
    (checkout / "configs").write_text("a file")
    before = contents(checkout)
    process = link(checkout)
    assert process.returncode == 1 and contents(checkout) == before
    assert process.stderr == (
        f"link_neox.py: {checkout} is not a GPT-NeoX checkout: it has no configs\n"
    )
