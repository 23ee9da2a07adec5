"""The pages tell the truth about settings, parameters, schedulers, paths and numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.readme import PAGES, ROOT, written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_code(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == written(page), "run: python -m tests.readme"


def test_every_file_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([\w./-]+)\)", text)
    tops = "app|clients|deploy|tests"
    named = re.findall(rf"`((?:{tops})/[\w./-]*)`", text)
    modules = re.findall(rf"`?python3? -m ((?:{tops})(?:\.\w+)+)", text)
    assert links and named and modules
    for path in {*links, *named}:
        assert (ROOT / path).exists(), path
    for module in set(modules):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
