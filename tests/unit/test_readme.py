"""The pages tell the truth about settings, parameters, schedulers, paths and numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.readme import PAGES, ROOT, written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_code(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == written(page), "run: python -m tests.readme"


def test_every_file_that_the_readme_names_exists() -> None:
    for path in ("clients/client.py", "clients/curl.sh", "app/demo/gallery.png", "app/demo/train.py", "LICENSE"):
        assert (ROOT / path).is_file(), path
