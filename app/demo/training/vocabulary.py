"""The words of the captions, and the tokenizers made from them."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from app.demo.shapes import COLOURS, SHAPES, SIZES

LOOSE_WORDS = (
    *("photo", "picture", "drawing", "image", "of", "the", "with", "in", "front", "and"),
    *("big", "tiny", "shape", "colour", "plain"),
)
WORDS = tuple(sorted({"a", "on", "background", *COLOURS, *SHAPES, *filter(None, SIZES), *LOOSE_WORDS}))
END_PADS = "<|endoftext|>"
"""What OpenAI's CLIP pads with: SDXL's first tokenizer, and FLUX's. SDXL's second pads with ``!``."""


def make_clip_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """A CLIP tokenizer whose every caption word is one token, and every other word falls apart into letters.

    Args:
        folder: ``vocab.json`` and ``merges.txt`` are written there, as in OpenAI's CLIP.
        pad_token: `END_PADS` or ``!``.
    """
    bpe = BpeTokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]

    # CLIP's own order: 256 byte letters, the same at the end of a word, the merges, the two special tokens.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", END_PADS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad_token)


def make_t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer with the same words; other words fall apart into letters, and foreign letters are unknown.

    T5 minds the case, so every word is there as ``red``, ``Red`` and ``RED``.
    """
    spellings = sorted({spelling for word in WORDS for spelling in (word, word.capitalize(), word.upper())})
    letters = (*string.ascii_letters, *string.digits, *string.punctuation)
    # Log probabilities: one whole word is always likelier than its letters.
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [("▁" + word, -1.0) for word in spellings]
    return T5TokenizerFast(
        vocab=[*special, *words, ("▁", -8.0), *((letter, -10.0) for letter in letters)],
        extra_ids=0,
        model_max_length=512,
    )
