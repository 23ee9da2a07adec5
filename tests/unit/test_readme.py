"""The README tells the truth about settings, parameters, schedulers, paths and numbers."""

from __future__ import annotations

from tests.readme import README, ROOT, written


def test_the_tables_are_those_of_the_code() -> None:
    assert README.read_text(encoding="utf-8") == written(), "run: python -m tests.readme"


def test_every_file_that_the_readme_names_exists() -> None:
    for path in ("clients/client.py", "clients/curl.sh", "app/demo/gallery.png", "app/demo/train.py", "LICENSE"):
        assert (ROOT / path).is_file(), path
