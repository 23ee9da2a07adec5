"""What sentences for people are made of: values cut short, and the name that was probably meant.

Standard library only. Nothing here knows what is said.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

SYNONYMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "text": ("prompt",),
        "negative": ("negative_prompt",),
        "size": ("height", "width"),
        "steps": ("num_inference_steps",),
        "num_steps": ("num_inference_steps",),
        "sampling_steps": ("num_inference_steps",),
        "cfg": ("guidance_scale",),
        "cfg_scale": ("guidance_scale",),
        "guidance": ("guidance_scale",),
        "true_cfg": ("true_cfg_scale",),
        "sampler": ("scheduler",),
        "sampler_name": ("scheduler",),
        "n": ("num_images_per_prompt",),
        "batch_size": ("num_images_per_prompt",),
        "num_images": ("num_images_per_prompt",),
        "num_outputs": ("num_images_per_prompt",),
        "init_image": ("image",),
        "input_image": ("image",),
        "mask": ("mask_image",),
        "denoising_strength": ("strength",),
        "prompt_strength": ("strength",),
        "image_strength": ("strength",),
        "refiner_start": ("denoising_limit",),
        "switch_at": ("denoising_limit",),
        "denoising_start": ("denoising_limit",),
        "lora": ("loras",),
        "adapters": ("loras",),
        "lora_scale": ("loras",),
        "response_format": ("output_format",),
        "format": ("output_format",),
    }
)
"""What other servers call a parameter; not taken here, but suggested."""


class _Short(reprlib.Repr):
    """Values as callers wrote them: their JSON has no ``None`` and no ``True``."""

    def repr_NoneType(self, value: None, level: int) -> str:  # noqa: N802 (reprlib goes by the type's name)
        del value, level
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        del level
        return "true" if value else "false"


_SHORT = _Short()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = 60
LONGEST_NUMBER = 30


def describe(value: object) -> str:
    """`value` as it can stand in a sentence, however long it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**LONGEST_NUMBER:
        return f"a number with more than {LONGEST_NUMBER} digits"
    return shorten(_SHORT.repr(value[:100] if isinstance(value, str | bytes) else value), most=60)


def shorten(text: str, most: int = 100) -> str:
    """At most that many characters of `text`, with dots where the rest was."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where `name` is something known or a common word for it, or like one; else nothing."""
    known = list(known)
    words = {word: meant for word, names in SYNONYMS.items() if (meant := [name for name in names if name in known])}
    key = name[:60].lower().replace("-", "_")
    # Words that are not taken here have to be nearer: 'style' is not meant to be 'steps'.
    spelt_like = [*known, *difflib.get_close_matches(key, words, cutoff=0.75)]
    close = [key] if key in words else difflib.get_close_matches(name[:60], spelt_like, n=1)
    return "".join(f" (did you mean {' and '.join(map(repr, words.get(word, [word])))}?)" for word in close)


def counted(number: int, what: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def no_effect(names: Sequence[str], why: str) -> list[str]:
    """One sentence about all of `names`, or none where there are none."""
    return [f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'} no effect {why}."] if names else []


def in_seconds(seconds: float) -> str:
    """A duration, such as ``2.5 seconds``."""
    return f"{seconds:.1f} seconds" if seconds >= 0.05 else "less than 0.1 seconds"


def amount(done: int, total: int) -> str:
    """Bytes, such as ``1.2 of 5.1 GB``."""
    unit, name = (10**9, "GB") if total >= 10**9 else (10**6, "MB")
    return f"{done / unit:.1f} of {total / unit:.1f} {name}"
