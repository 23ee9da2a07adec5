"""CLIP's vocabulary, which no checkpoint contains: from an installed package that carries it, as a tokenizer's files.

Source: https://github.com/openai/CLIP, simple_tokenizer.py: 256 bytes as characters, the same at the end of a word, the
results of the merges in their order, and the two special tokens, numbered through.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

PACKAGES = ("open_clip", "clip")
"""Python packages that carry the file; none is imported."""
FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def find() -> Path | None:
    """The vocabulary of the first installed package that has it."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / FILE).is_file():
                return Path(folder) / FILE
    return None


def write_tokenizer(vocabulary: Path, folder: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt`` of CLIP's tokenizer.

    Args:
        vocabulary: OpenAI's compressed list of merges, whose first line is a heading.
        folder: which exists.
    """
    with gzip.open(vocabulary, "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : MERGES + 1]
    merges = [merge for merge in merges if merge]
    letters = _letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in merges), *SPECIAL]
    numbered = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbered, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _letters() -> list[str]:
    """One visible character for each byte: its own where it has one, the printable ones first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
