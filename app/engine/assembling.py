"""From checked weights to the family that runs them: reads them, brings them to the device and puts all together.

Imports torch, and so is imported when that is wanted. Nothing here knows how weights are found.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import nn

from app.engine import loading
from app.engine.adapters import Adapters, load_adapters
from app.engine.family import Family
from app.engine.folders import Kind, ModelFolder
from app.engine.loading import Format, Progress
from app.engine.optimization import Optimization, choose_optimization
from app.engine.placement import Placement, choose_placement, place, store_as_fp8
from app.engine.ranks import Ranks
from app.engine.single_files import Source
from app.settings import Settings
from app.start import Timeline

if TYPE_CHECKING:
    from app.engine.parallel import Parallel

logger = logging.getLogger(__name__)

ONE_AT_A_TIME = threading.Lock()
"""Held while weights are read: to make a module that is empty at first, the libraries change torch for every thread."""

Report = Callable[[str], None]


def assemble(
    settings: Settings,
    base: Source,
    rest: ModelFolder | None,
    refiner: Source | None,
    report: Report,
    timeline: Timeline,
    ranks: Ranks | None,
) -> Family[Any]:
    """The family of a model whose files are found and checked, on its device.

    Args:
        settings: where to, and how.
        base: the model, or the transformer of a FLUX model.
        rest: what belongs to that transformer.
        refiner: the refiner, if there is one.
        report: hears what is being done.
        timeline: of the start.
        ranks: which of several processes this is.

    Raises:
        ModelLoadFailed: with one sentence that names the folder or file and what to do.
    """
    parallel = None
    with timeline.phase("device"):
        if ranks is not None:
            from app.engine.parallel import Parallel, own_device

            settings = own_device(settings, ranks)
        placement = choose_placement(settings)
        if placement.device.type == "cuda":
            # What does not ask where its tensors lie works on the GPU that is its thread's own.
            torch.cuda.set_device(placement.device)
        if ranks is not None:
            report("meeting the other processes")
            parallel = Parallel(ranks, placement.device)
    optimization = choose_optimization(settings, placement)
    numbers = Format(
        placement.dtype,
        placement.quantization_config(),
        aligned=placement.device.type == "cpu",
        device=placement.read_to,
        shrinks=settings.quantization == "fp8",
    )
    logger.info("loading %s as %s on %s", base.path, placement.dtype, placement.device)
    progress = Progress(report, sum(source.size for source in (base, rest, refiner) if source is not None))
    with timeline.phase("read"), ONE_AT_A_TIME:
        components = _load_base(base, rest, numbers, progress)
        others = {} if refiner is None else _load_refiner(refiner, base, components, numbers, progress)
        for source, loaded in ((rest or base, components), (refiner, others)):
            if source is not None:
                loading.check_tokenizers(source.path if isinstance(source, ModelFolder) else source.config, loaded)
    pipeline = _make_base(base, components)
    second = None if refiner is None else _make_refiner(refiner, others)
    # Before parts are offloaded or quantized: the hooks that do so have to see the adapters' layers.
    with timeline.phase("read"), ONE_AT_A_TIME:
        adapters = load_adapters(pipeline, settings.lora)
    with timeline.phase("device"):
        _place(_parts([("", components), ("refiner's ", others)]), settings, placement, report)
    family = _make_family(base.kind, pipeline, second, adapters, optimization, parallel)
    family.interleaves = placement.interleaves
    if optimization.compiles and optimization.sizes:
        family.rehearsal_size = optimization.sizes[0]
    if parallel is not None:
        report("waiting for the other processes")
        with timeline.phase("read"):
            parallel.wait()
    return family


# --- Reading them ----------------------------------------------------------------------------------------------


def _load_base(source: Source, rest: ModelFolder | None, numbers: Format, progress: Progress) -> dict[str, Any]:
    if isinstance(source, ModelFolder):
        return loading.load_folder(source, numbers, progress)

    from app.engine import converting

    if rest is not None:
        return converting.load_flux_file(source, rest, numbers, progress)
    return converting.load_sdxl_file(source, numbers, progress, "config_dir")


def _load_refiner(
    source: Source, base: Source, components: dict[str, Any], numbers: Format, progress: Progress
) -> dict[str, Any]:
    """The refiner's components; those that equal the base's are the base's own."""
    if isinstance(source, ModelFolder):
        known = loading.shared_components(source, base, components) if isinstance(base, ModelFolder) else {}
        loaded = loading.load_folder(source, numbers, progress, known=known)
    else:
        from app.engine import converting

        tokenizer = {"tokenizer_2": components["tokenizer_2"]} if source.shipped else {}
        loaded = converting.load_sdxl_file(source, numbers, progress, "refiner_config_dir", tokenizer)
    shared = loading.share(loaded, components)
    if shared:
        logger.info("the refiner shares %s with the base: its memory is paid once", " and ".join(sorted(shared)))
    return loaded


# --- Putting them together -------------------------------------------------------------------------------------


def _make_base(base: Source, components: dict[str, Any]) -> Any:
    if base.kind is Kind.FLUX:
        return diffusers.FluxPipeline(**components)
    kind = diffusers.StableDiffusionXLPipeline
    return kind(**components, **_options(base, kind), add_watermarker=False)


def _make_refiner(refiner: Source, components: dict[str, Any]) -> Any:
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    options = _options(refiner, kind)
    return kind(text_encoder=None, tokenizer=None, **components, **options, add_watermarker=False)


def _options(source: Source, pipeline: type[Any]) -> dict[str, bool]:
    """What the source's index says, as far as `pipeline` takes it: the index may be another pipeline's."""
    options = source.options if isinstance(source, ModelFolder) else loading.pipeline_options(source.config)
    taken = inspect.signature(pipeline.__init__).parameters
    return {name: value for name, value in options.items() if name in taken}


def _parts(sources: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Every module once, by a name for people."""
    parts: dict[str, Any] = {}
    for prefix, components in sources:
        for name, component in components.items():
            if isinstance(component, nn.Module) and not any(component is part for part in parts.values()):
                parts[f"{prefix}{name}"] = component
    return parts


def _place(parts: dict[str, Any], settings: Settings, placement: Placement, report: Report) -> None:
    """Bring every part to where it belongs, as the settings want it."""
    for name, part in parts.items():
        if name.endswith("vae"):
            if settings.vae_tiling:
                part.enable_tiling()
            if settings.vae_slicing:
                part.enable_slicing()
        if name.endswith(("unet", "transformer")) and settings.quantization == "fp8":
            store_as_fp8(part, placement.dtype)
    place(parts, placement, report)


def _make_family(
    kind: Kind,
    pipeline: Any,
    refiner: Any,
    adapters: Adapters | None,
    optimization: Optimization,
    parallel: Parallel | None,
) -> Family[Any]:
    if adapters is not None and optimization.compiles:
        from app.engine.merged_adapters import MergedAdapters

        adapters = MergedAdapters(pipeline, adapters.scales)
    if kind is Kind.FLUX:
        from app.engine.flux import FluxFamily

        return FluxFamily(pipeline, adapters, optimization, parallel)
    from app.engine.sdxl import SdxlFamily

    return SdxlFamily(pipeline, refiner, adapters, optimization)
