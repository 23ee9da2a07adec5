"""LoRA adapters by the names that requests call them: loaded at start, switched on between forward passes.

Nothing is fused and nothing reloaded for a request; jobs with the same adapters and scales share forward passes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.engine.checkpoints import SUFFIX, read_checkpoint
from app.errors import InvalidRequest, ModelLoadFailed, first_line
from app.sentences import describe, nearest
from app.settings import ADAPTER

logger = logging.getLogger(__name__)

FILE = "pytorch_lora_weights.safetensors"
"""Under this name diffusers and its training scripts save an adapter in a folder."""
UNREAD = (
    # A part of tensors' names, and the adapters that have it: diffusers refuses these, or reads a part of them.
    ("dora_scale", "a DoRA in the layout of kohya's scripts"),
    (".hada_w", "a LoHa of LyCORIS"),
    (".lokr_w", "a LoKr of LyCORIS"),
    (".oft_", "an OFT"),
    (".on_input", "an (IA)³ of LyCORIS"),
    (".lora_mid.", "a Tucker decomposition of LyCORIS"),
    (".w_norm", "one of LyCORIS that changes norms"),
)
LAYER = re.compile(r"lora(_up|_B|\w*\.up)\b.*weight")
"""In the name of one tensor of each layer, whoever wrote the adapter."""
FUSED = {"qkv": 3, "linear1": 4}
"""As how many layers diffusers has these of FLUX, by a part of their names in other layouts."""
PREFIXES = ("transformer.", "text_encoder.")
"""Of FLUX's layers, by the part that they are in."""
KOHYA = {
    "lora_unet_add_embedding_linear_1": "lora_unet_label_emb_0_0",
    "lora_unet_add_embedding_linear_2": "lora_unet_label_emb_0_2",
}
"""Layers by the names that OneTrainer has from diffusers, which passes over these, and by kohya's, which it reads."""

Loras = tuple[tuple[str, float], ...]
"""Names and scales, as `GenerateRequest.loras` has them."""


class Adapters:
    """The adapters that a pipeline has loaded.

    Args:
        pipeline: it has loaded them already, each under its name.
        scales: the server's own scale of each; multiplied with a request's.
    """

    def __init__(self, pipeline: Any, scales: Mapping[str, float]) -> None:
        self._pipeline = pipeline
        self.scales = dict(scales)
        self._active: Loras | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.scales)

    @property
    def active(self) -> Loras:
        """What the next forward passes use."""
        return self._active or ()

    def activate(self, loras: Loras) -> None:
        """Have the next forward passes use `loras` and no others; called on the device thread alone."""
        if loras == self._active:
            return
        if loras:
            self._pipeline.enable_lora()
            names = [name for name, _ in loras]
            self._pipeline.set_adapters(names, [scale * self.scales[name] for name, scale in loras])
        else:
            self._pipeline.disable_lora()
        self._active = loras


def resolve(loras: Loras | None, names: Sequence[str]) -> Loras:
    """`loras` in one order, without those whose scale is 0.

    Raises:
        InvalidRequest: a name that is not in `names`.
    """
    for name, _ in loras or ():
        if name not in names:
            hint = nearest(name, names) or f"; there are {', '.join(names)}"
            raise InvalidRequest(f"loras: there is no adapter {describe(name)}{hint}.")
    return tuple(sorted((name, scale) for name, scale in loras or () if scale))


def load_adapters(pipeline: Any, references: Sequence[str]) -> Adapters | None:
    """Load what ``--lora`` names.

    Args:
        pipeline: a diffusers pipeline, before anything is offloaded or quantized.
        references: ``NAME=PATH`` or ``NAME=PATH:SCALE`` each.

    Raises:
        ModelLoadFailed: with one sentence that names the file and what to do.
    """
    if not references:
        return None
    transformer = getattr(pipeline, "transformer", None)
    channels = None if transformer is None else transformer.config.in_channels
    found = find_adapters(references)
    for name, (path, _) in found.items():
        logger.info("loading the adapter %s from %s", name, path)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several are wanted
                # peft's own guess from layers' names, which it does not follow where it has the layers themselves.
                warnings.filterwarnings("ignore", "While injecting the PEFT adapters, an inconsistency")
                source = _read_kohya(path, pipeline) or path.parent
                pipeline.load_lora_weights(source, weight_name=path.name, adapter_name=name, local_files_only=True)
        except Exception as error:
            why = "its layers are of other sizes" if "size mismatch" in str(error) else first_line(error)
            raise ModelLoadFailed(f"The adapter in {path} does not fit the model: {why}.") from error
        if not any(name in adapters for adapters in pipeline.get_list_adapters().values()):
            raise ModelLoadFailed(f"The adapter in {path} has no weights for this model; name one made for it.")
        _warn_of_ignored(pipeline, name, path)
        if transformer is not None and (
            transformer.config.in_channels != channels or getattr(transformer, "_transformer_norm_layers", None)
        ):
            # diffusers has changed the model itself, for requests without the adapter too.
            raise ModelLoadFailed(
                f"The adapter in {path} is a Control LoRA (such as FLUX.1 Depth or Canny), which needs a second "
                "picture in every step and is not served; leave it out."
            )
    pipeline.disable_lora()
    return Adapters(pipeline, {name: scale for name, (_, scale) in found.items()})


def find_adapters(references: Sequence[str]) -> dict[str, tuple[Path, float]]:
    """File and scale of each adapter that ``--lora`` names, checked as far as that goes without reading weights.

    Raises:
        ModelLoadFailed: with one sentence that names the file and what to do.
    """
    found: dict[str, tuple[Path, float]] = {}
    for reference in references:
        name, path, scale = parse_reference(reference)
        if name in found:
            raise ModelLoadFailed(f"--lora names {name!r} twice; each adapter needs a name of its own.")
        with contextlib.suppress(OSError):  # of a path that cannot be looked at, which the check tells
            if path.is_dir():
                path /= FILE
            elif path.exists() and path.suffix != SUFFIX:  # others could run code
                raise ModelLoadFailed(
                    f"The adapter {path} is no {SUFFIX} file; convert it, other formats are not read."
                )
        _check_file(path)
        found[name] = path, scale
    return found


def parse_reference(reference: str) -> tuple[str, Path, float]:
    """``NAME=PATH[:SCALE]`` in its parts.

    Raises:
        ModelLoadFailed: it is something else.
    """
    parts = ADAPTER.fullmatch(reference)
    if parts is None:
        raise ModelLoadFailed(f"--lora is {describe(reference)}, but it must be NAME=PATH or NAME=PATH:SCALE.")
    name, rest = parts.groups()
    path, colon, scale = rest.rpartition(":")
    if not colon or not re.fullmatch(r"-?\d+(\.\d*)?|-?\.\d+", scale):
        return name, Path(rest), 1.0
    return name, Path(path), float(scale)


def _check_file(path: Path) -> None:
    """Only whole files are read, and only what diffusers reads whole."""
    try:
        names = read_checkpoint(path).shapes
    except ModelLoadFailed as error:
        raise ModelLoadFailed(f"The adapter {error}") from None
    for part, kind in UNREAD:
        if any(part in name for name in names):
            raise ModelLoadFailed(f"The adapter {path} is {kind}, and only LoRA and LoCon are read; take one of those.")


def _warn_of_ignored(pipeline: Any, name: str, path: Path) -> None:
    """Tell of layers for which the model has no place, over which diffusers passes."""
    has = sum(
        next((parts for part, parts in FUSED.items() if part in tensor), 1)
        for tensor in read_checkpoint(path).shapes
        if LAYER.search(tensor)
    )
    modules = [part.modules() for part in pipeline.components.values() if hasattr(part, "modules")]
    takes = sum(name in getattr(module, "lora_A", ()) for module in itertools.chain(*modules))
    if takes < has:
        logger.warning(
            "the model takes %d of the %d layers that the adapter %s has, and ignores the others", takes, has, name
        )


def _read_kohya(path: Path, pipeline: Any) -> dict[str, Any] | None:
    """The tensors of an adapter in the layout of kohya's scripts, in a form of which diffusers reads every layer.

    Where layers differ in alpha, as in adapters that were extracted from a model or made smaller, diffusers takes the
    most common one for SDXL's attention and text encoders, too strong or too weak, and none for FLUX's last layer. So
    each is multiplied into its layer's weights then. FLUX's layers around its blocks get names under which diffusers
    finds them.

    Returns:
        ``None`` where the adapter is in another layout.
    """
    from safetensors.torch import load_file  # which imports torch

    if not any(name.endswith(".lora_up.weight") for name in read_checkpoint(path).shapes):
        return None
    is_flux = hasattr(pipeline, "transformer")
    tensors = load_file(path)
    for name in list(tensors):
        layer, dot, kind = name.partition(".")
        if layer in KOHYA:
            tensors[f"{KOHYA[layer]}{dot}{kind}"] = tensors.pop(name)
    layers = [name.removesuffix("lora_up.weight") for name in tensors if name.endswith(".lora_up.weight")]
    alphas = {layer: tensors[f"{layer}alpha"].item() for layer in layers if f"{layer}alpha" in tensors}
    if is_flux or len(set(alphas.values())) > 1:
        for layer, alpha in alphas.items():
            up, rank = tensors[f"{layer}lora_up.weight"], len(tensors[f"{layer}lora_down.weight"])
            tensors[f"{layer}lora_up.weight"] = (up.float() * alpha / rank).to(up.dtype)
            del tensors[f"{layer}alpha"]
    if not is_flux:
        return tensors
    converted = pipeline.lora_state_dict(tensors)
    return {name if name.startswith(PREFIXES) else f"transformer.{name}": each for name, each in converted.items()}
