"""Makes a GPT-NeoX checkout load MetaLA: adds marked lines to the end of its megatron/__init__.py,
and links to the MetaLA model configurations to its configs/. `--unlink` removes both; every byte,
mode and link is then as before."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import megatron_patch
from megatron_patch.commands.command_line import CommandError, Parser, replacing, run_script

TESTED_COMMIT = "ea7aefd8f8e183256992d9fede4d7c71a46d67a5"
MARK = "# MetaLA plugin, added by link_neox.py"
# GPT-NeoX still starts and trains its other models if the plugin cannot be imported: this Python
# lacks it, or finds another package of its name.
CODE = """\
try:
    from megatron_patch.neox import register as register_metala
except ImportError as error:
    import os, sys
    if os.environ.get("RANK", "0") == "0":
        package = getattr(sys.modules.get("megatron_patch"), "__path__", ["nowhere"])
        print("MetaLA: not loaded, runs with metala layers will be refused:", error,
              "(megatron_patch found in", *package, end=")\\n", file=sys.stderr)
else:
    register_metala()
"""
# setup.py installs the configurations inside the package; in a checkout they are beside it.
PACKAGE = Path(megatron_patch.__file__).resolve().parent
CONFIGS = (PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent) / "configs"
# Comments among the lines record what `--unlink` has to know, in ASCII: the file may have another
# encoding than UTF-8.
NO_END = "# the line before had no end"
LINKED = "# configurations are links to"


def entry_point(checkout: Path) -> Path:
    """Returns megatron/__init__.py, which every GPT-NeoX program imports first. Raises a
    FileNotFoundError if `checkout` is not GPT-NeoX."""
    needed = ("deepy.py", "train.py", "megatron/__init__.py", "megatron/model/gpt2_model.py")
    missing = [name for name in needed if not (checkout / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{checkout} is not a GPT-NeoX checkout: it has no {missing[0]}")
    return checkout / "megatron" / "__init__.py"


def write(path: Path, content: bytes) -> None:
    """Replaces a file's content in one step. The file's mode stays, and links to it stay valid."""
    path = path.resolve()
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        shutil.copymode(path, temporary)
        if os.geteuid() == 0:  # for root the new file would have another owner
            os.chown(temporary, path.stat().st_uid, path.stat().st_gid)


def own_content(content: bytes) -> bytes:
    """Returns the file's content without the plugin's lines."""
    kept: list[bytes] = []
    for line in content.splitlines(keepends=True):
        if MARK.encode() not in line:
            kept.append(line)
        elif line.startswith(NO_END.encode()) and kept:
            kept[-1] = kept[-1].removesuffix(b"\n")
    return b"".join(kept)


def linked_content(own: bytes, names: list[str]) -> bytes:
    """Returns the file's content with the plugin's lines, which record the linked files."""
    lines = [*CODE.splitlines(), f"{LINKED} {(str(CONFIGS), names)!a}"]
    if own and not own.endswith((b"\n", b"\r")):
        own += b"\n"
        lines.insert(0, NO_END)
    return own + "".join(f"{line}  {MARK}\n" for line in lines).encode("ascii")


def linked_configs(checkout: Path, content: bytes) -> list[Path]:
    """Returns the links in configs/ that the file's lines record, made by this or another clone."""
    folder = checkout / "configs"
    pattern = rf"^{re.escape(LINKED)} (.+)  {re.escape(MARK)}$"
    if noted := re.search(pattern.encode(), content, re.MULTILINE):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            source, names = ast.literal_eval(noted[1].decode("ascii"))
            return [p for p in map(folder.joinpath, names) if is_link(p, f"{source}/{p.name}")]
    return []


def is_link(path: Path, target: str) -> bool:
    return path.is_symlink() and os.readlink(path) == target


class Changes:
    """A transaction of file changes: an error undoes those already made."""

    def __init__(self) -> None:
        self.made: list[Callable[[], None]] = []

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for undo in reversed(self.made):
                with contextlib.suppress(OSError):
                    undo()

    def relink(self, path: Path, target: str | None) -> None:
        """Makes `path` a link to `target`, or removes it for `None`. `path` is a link or absent."""
        before = os.readlink(path) if path.is_symlink() else None
        if before != target:
            self.made.append(lambda: set_link(path, before))
            set_link(path, target)

    def rewrite(self, path: Path, content: bytes) -> None:
        if (before := path.read_bytes()) != content:
            write(path, content)
            self.made.append(lambda: write(path, before))


def set_link(path: Path, target: str | None) -> None:
    """Replaces a link, or removes it where `target` is `None`."""
    path.unlink(missing_ok=True)
    if target is None:
        return
    try:
        path.symlink_to(target)
    except OSError as error:  # Python's message names the target, not the link
        raise OSError(error.errno, error.strerror, str(path)) from None


def link(checkout: Path) -> tuple[bool, list[str]]:
    """Adds the lines and the configuration links, in place of those of
    another clone. Returns whether anything changed, and the names of the user's own configurations,
    which stay. Raises a FileNotFoundError if `checkout` is not GPT-NeoX, and a CommandError if the
    plugin's configurations are missing."""
    init = entry_point(checkout)
    if not (checkout / "configs").is_dir():
        raise FileNotFoundError(f"{checkout} is not a GPT-NeoX checkout: it has no configs")
    content = init.read_bytes()
    linked = linked_configs(checkout, content)
    targets = [checkout / "configs" / path.name for path in sorted(CONFIGS.glob("metala*.yml"))]
    if not targets:
        raise CommandError(f"found no metala*.yml in {CONFIGS}, wanted MetaLA's configurations")
    wanted = [path for path in targets if path in linked or not os.path.lexists(path)]
    with Changes() as changes:
        # The record comes before the links, so that a killed process leaves no unrecorded link.
        names = [path.name for path in wanted]
        changes.rewrite(init, linked_content(own_content(content), names))
        for path in {*linked} - {*wanted}:  # another clone's configurations, which this one lacks
            changes.relink(path, None)
        for path in wanted:
            changes.relink(path, f"{CONFIGS}/{path.name}")
        return bool(changes.made), [path.name for path in targets if path not in wanted]


def unlink(checkout: Path) -> bool:
    """Removes what `link` of this or another clone added; returns whether there was anything."""
    init = entry_point(checkout)
    content = init.read_bytes()
    with Changes() as changes:
        for path in linked_configs(checkout, content):
            changes.relink(path, None)
        changes.rewrite(init, own_content(content))
        return bool(changes.made)


def commit_of(checkout: Path) -> str | None:
    """Returns the checkout's commit, or `None` where git does not know it."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="folder of a GPT-NeoX checkout")
    parser.add_argument("--unlink", action="store_true", help="undo the link")
    args = parser.parse_args(argv)
    kept: list[str] = []
    if args.unlink:
        changed = unlink(args.checkout)
    else:
        changed, kept = link(args.checkout)
    state = "unlinked" if args.unlink else "linked"
    print(f"{args.checkout}: {state if changed else f'already {state}'}")
    for name in kept:
        print(f"  configs/{name} is your own and stays; MetaLA's is {CONFIGS / name}")
    commit = commit_of(args.checkout)
    if not args.unlink and commit != TESTED_COMMIT:
        print(f"  this checkout is at {commit or 'an unknown commit'}, tested with {TESTED_COMMIT}")


cli = partial(run_script, main)
