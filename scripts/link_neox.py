#!/usr/bin/env python3
"""Makes a GPT-NeoX checkout load MetaLA by itself: marked lines at the end of its
megatron/__init__.py, and links to the MetaLA model configurations in its configs/. `--unlink` takes
both away again."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

TESTED_COMMIT = "ea7aefd8f8e183256992d9fede4d7c71a46d67a5"
MARK = "# MetaLA plugin, added by link_neox.py"
# GPT-NeoX starts where the plugin cannot be imported (another package has its name, or this Python
# does not have it) and knows no layer of type metala there.
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
LINES = "".join(f"{line}  {MARK}\n" for line in CODE.splitlines())
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def entry_point(checkout: Path) -> Path:
    """The file every GPT-NeoX program imports first.

    Raises:
        FileNotFoundError: `checkout` is not GPT-NeoX.
    """
    needed = ("deepy.py", "train.py", "megatron/__init__.py", "megatron/model/gpt2_model.py")
    missing = [name for name in needed if not (checkout / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{checkout} is not a GPT-NeoX checkout: it has no {missing[0]}")
    return checkout / "megatron" / "__init__.py"


def write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def link(checkout: Path) -> bool:
    """Adds the lines, in place of those of an earlier version, and the configuration links; returns
    whether anything changed."""
    init = entry_point(checkout)
    text = init.read_text()
    own = "".join(line for line in text.splitlines(keepends=True) if MARK not in line)
    linked = own + ("" if own.endswith("\n") else "\n") + LINES
    changed = text != linked
    if changed:
        write(init, linked)
    for config in sorted(CONFIGS.glob("metala*.yml")):
        target = checkout / "configs" / config.name
        if not target.exists():
            target.unlink(missing_ok=True)  # a link whose end has moved
            target.symlink_to(config)
            changed = True
    return changed


def unlink(checkout: Path) -> bool:
    """Removes what `link` added; returns whether anything was there."""
    init = entry_point(checkout)
    lines = init.read_text().splitlines(keepends=True)
    kept = [line for line in lines if MARK not in line]
    changed = len(kept) != len(lines)
    if changed:
        write(init, "".join(kept))
    for target in (checkout / "configs").glob("metala*.yml"):
        if target.is_symlink() and Path(os.readlink(target)).parent == CONFIGS:
            target.unlink()
            changed = True
    return changed


def commit_of(checkout: Path) -> str | None:
    """The checkout's commit, or `None` where git does not know it."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="folder of a GPT-NeoX checkout")
    parser.add_argument("--unlink", action="store_true", help="undo the link")
    args = parser.parse_args()
    try:
        changed = (unlink if args.unlink else link)(args.checkout)
    except OSError as error:
        sys.exit(f"link_neox.py: {error}")
    state = "unlinked" if args.unlink else "linked"
    print(f"{args.checkout}: {state if changed else f'already {state}'}")
    commit = commit_of(args.checkout)
    if not args.unlink and commit != TESTED_COMMIT:
        print(f"  this checkout is at {commit or 'an unknown commit'}, tested with {TESTED_COMMIT}")


if __name__ == "__main__":
    main()
