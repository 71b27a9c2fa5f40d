"""Tests that the documents say what the code says: the tables of settings, paths and links."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_patch.architecture import MODEL_OPTIONS, MetaLAOptions, SettingsError
from megatron_patch.architecture_neox import GPT_NEOX_DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
# Dated logs name files that are gone.
HISTORY = ("CHANGELOG.md", "kernel-log.md")


def rows(heading: str) -> dict[str, list[str]]:
    """The cells of a chapter's tables in docs/settings.md, by the key in the first column."""
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    chapter = re.search(rf"\n## {re.escape(heading)}\n(.*?)(\n## |\Z)", text, re.DOTALL)[1]
    lines = re.findall(r"^\| `(\w+)` \| (.*) \|$", chapter, re.MULTILINE)
    return {key: cells.split(" | ") for key, cells in lines}


def written(value: object) -> str:
    """A value as the tables write it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def test_the_options_of_metala_layers():
    table = rows("MetaLA's own options")
    assert list(table) == [item.name for item in fields(MetaLAOptions)]
    for item in fields(MetaLAOptions):
        default, wanted, _, exported = table[item.name]
        assert default == written(item.default), item.name
        assert exported == ("yes" if item.name in MODEL_OPTIONS else "no"), item.name
        with pytest.raises(SettingsError, match=rf"^metala\.{item.name}: .*wanted {wanted}$"):
            MetaLAOptions.parse({item.name: []})


def test_defaults_of_gpt_neox():
    table = rows("GPT-NeoX's settings of the model")
    assert len(table) > 20
    for key, (default, *_) in table.items():
        if default != "–":
            assert default == written(GPT_NEOX_DEFAULTS[key]), key


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target
    if page.name not in HISTORY:
        paths = re.findall(r"\b((?:scripts|convert|configs|megatron_patch)/[\w/.]*\w)", text)
        for path in paths:
            assert (ROOT / path).exists(), path
