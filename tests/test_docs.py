"""The documents point at what is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_symbols_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for file, symbol in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
        defined = {node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")}
        assert symbol in defined, f"{file}::{symbol}"
