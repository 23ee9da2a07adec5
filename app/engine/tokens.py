"""How many tokens a text has, for whoever has to know before the device thread reads it."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any


class TokenCounter:
    """Counts the tokens of texts, the special ones at both ends included; any thread may ask.

    Args:
        tokenizer: of a loaded pipeline; counting would set it up anew while the device thread reads with it, so that
            the counter takes a copy, once it is asked for the first time.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._original = tokenizer
        self._lock = threading.Lock()

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return copy.deepcopy(self._original)

    def __call__(self, text: str) -> int:
        with self._lock:
            return len(self._tokenizer(text, truncation=False, verbose=False).input_ids)
