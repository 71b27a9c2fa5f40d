"""`scripts/link_neox.py` adds its line once, takes it away without a trace, and knows GPT-NeoX."""

import os
import shutil
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


def link(*arguments, script=SCRIPT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, text=True
    )


def contents(folder: Path) -> dict[str, tuple]:
    """Mode, owner and content of all there is; of links where they lead to."""
    return {
        str(p): (
            p.lstat().st_mode,
            p.lstat().st_uid,
            os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None,
        )
        for p in folder.rglob("*")
    }


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
    assert contents(checkout) == before
    assert "already unlinked" in link(checkout, "--unlink").stdout


def test_linking_again_replaces_the_line_of_an_earlier_version(checkout):
    init = checkout / "megatron/__init__.py"
    init.write_text("import torch  # as it was\n")
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


@pytest.mark.parametrize(
    "content",
    [b"", b"x = 1", b"x = 1\n", b"x = 1\r\n", b"x = 1\r\ny = 2", b"x = 1\n\n\n", b"x = 1\r"]
    + [b"# -*- coding: latin-1 -*-\nx = '\xe9'", b"\xef\xbb\xbfx = 1\n\x0c\ny = '\xc2\x85'\n"],
)
def test_every_byte_mode_and_link_is_as_before(checkout, content):
    """Of which a linked file still runs, and may be linked twice."""
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


def test_what_is_the_users_own_stays_and_is_said(checkout, tmp_path_factory):
    """Files, links to other files, to nothing, and to what would have been linked."""
    mine = tmp_path_factory.mktemp("mine")
    (mine / "metala_3b.yml").write_text("mine")
    configs = checkout / "configs"
    (configs / "metala.yml").write_text("mine")
    (configs / "metala_3b.yml").symlink_to(mine / "metala_3b.yml")
    (configs / "metala_1b.yml").symlink_to("/not/mounted/metala_1b.yml")
    (configs / "metala_tiny.yml").symlink_to(SCRIPT.parent.parent / "configs/metala_tiny.yml")
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
    """Another clone of the plugin, with a configuration of its own."""
    folder = tmp_path_factory.mktemp("clone é") / "clone"
    shutil.copytree(SCRIPT.parent, folder / "scripts", ignore=shutil.ignore_patterns("__*"))
    shutil.copytree(SCRIPT.parent.parent / "configs", folder / "configs", symlinks=True)
    (folder / "configs/metala_new.yml").write_text("new")
    return folder


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_checkout_that_another_clone_has_linked(checkout, clone, is_gone):
    """Linked again, it has this clone's configurations; each may undo it."""
    before = contents(checkout)
    configs = checkout / "configs"
    linker = clone / "scripts/link_neox.py"
    for undo in (SCRIPT, SCRIPT, linker):
        if not linker.exists():
            break
        assert link(checkout, script=linker).returncode == 0
        assert os.readlink(configs / "metala.yml") == str(clone / "configs/metala.yml")
        if is_gone:
            shutil.rmtree(clone)
        if undo is SCRIPT:
            assert ": linked" in link(checkout).stdout
            assert (configs / "metala.yml").resolve().parent == SCRIPT.parent.parent / "configs"
            assert not os.path.lexists(configs / "metala_new.yml")
        assert ": unlinked" in link(checkout, "--unlink", script=undo).stdout
        assert contents(checkout) == before


def test_links_of_an_earlier_version_are_known(checkout, clone):
    init, configs = checkout / "megatron/__init__.py", checkout / "configs"
    init.write_text("import torch\nold()  # MetaLA plugin, added by link_neox.py\n")
    (configs / "metala.yml").symlink_to(clone / "configs/metala.yml")
    (configs / "metala_1b.yml").symlink_to("/mine/metala_1b.yml")
    assert "unlinked" in link(checkout, "--unlink").stdout
    assert [path.name for path in configs.iterdir()] == ["metala_1b.yml"]
    assert init.read_text() == "import torch\n"


@pytest.mark.parametrize("part", ["lines", "links"])
@pytest.mark.parametrize("options", [[], ["--unlink"]])
def test_what_cannot_be_done_is_not_half_done(checkout, part, options, monkeypatch, capsys):
    """A read-only folder, for which a failing call stands: whoever runs the tests may write."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from megatron_patch.commands import link_neox

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


def test_a_checkout_without_a_folder_of_configurations(checkout):
    (checkout / "configs").rmdir()
    (checkout / "configs").write_text("a file")
    before = contents(checkout)
    process = link(checkout)
    assert process.returncode == 1 and contents(checkout) == before
    assert process.stderr == (
        f"link_neox.py: {checkout} is not a GPT-NeoX checkout: it has no configs\n"
    )
