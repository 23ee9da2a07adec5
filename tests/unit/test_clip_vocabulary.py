"""CLIP's vocabulary, from the one file that OpenAI published it as to a tokenizer."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from app.engine import clip_vocabulary
from app.engine.single_files import CONFIGS

HELLO = ["h e", "l l", "he ll", "hell o</w>"]
BYTES = 512
"""Every byte once, and once more at the end of a word."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package under one of the names, with a vocabulary of four merges; importing it is an error."""
    folder = tmp_path / "open_clip"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('nobody should import this')")
    with gzip.open(folder / clip_vocabulary.FILE, "wt", encoding="utf-8") as file:
        file.write("\n".join(["bpe_simple_vocab_16e6.txt#version: 0.2", *HELLO, ""]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    return folder / clip_vocabulary.FILE


def test_the_vocabulary_is_found_without_importing_the_package(package: Path) -> None:
    assert clip_vocabulary.find() == package
    assert "open_clip" not in sys.modules


def test_no_package_or_one_without_the_file_is_no_vocabulary(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.unlink()
    monkeypatch.setattr(clip_vocabulary, "PACKAGES", ("open_clip", "a_package_that_nobody_has"))
    assert clip_vocabulary.find() is None


@pytest.mark.parametrize(("name", "pad"), [("tokenizer", BYTES + 5), ("tokenizer_2", 0)])
def test_tokens_are_numbered_as_openai_numbers_them(package: Path, tmp_path: Path, name: str, pad: int) -> None:
    made = tmp_path / "made"
    made.mkdir()
    clip_vocabulary.write_tokenizer(package, made)
    (made / "tokenizer_config.json").write_text((CONFIGS / "sdxl-base" / name / "tokenizer_config.json").read_text())
    numbers = json.loads((made / "vocab.json").read_text(encoding="utf-8"))
    assert len(numbers) == BYTES + len(HELLO) + 2
    assert [numbers[token] for token in ("!", "!</w>", "he", "hello</w>")] == [0, 256, BYTES, BYTES + 3]
    tokenizer = CLIPTokenizer.from_pretrained(made)
    begin, end = BYTES + 4, BYTES + 5
    assert tokenizer("Hello").input_ids == [begin, BYTES + 3, end]
    # Letter by letter where nothing merges: a byte inside a word, and one at its end.
    assert tokenizer("é?").input_ids == [begin, numbers["Ã"], numbers["©</w>"], numbers["?</w>"], end]
    assert tokenizer("hello", padding="max_length", max_length=5).input_ids[-2:] == [pad, pad]
    assert tokenizer.model_max_length == 77


def test_the_published_vocabulary_gives_the_published_numbers(tmp_path: Path) -> None:
    """Source: the documentation of the Rust crate instant_clip_tokenizer, which has them from OpenAI's tokenizer."""
    found = clip_vocabulary.find()
    if found is None:
        pytest.skip("the extra single-file is not installed")
    clip_vocabulary.write_tokenizer(found, tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 49408
    assert tokenizer("Hi there").input_ids == [49406, 1883, 997, 49407]
