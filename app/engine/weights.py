"""From settings to a loaded model: which weights are meant and that they fit together; `assembling.py` does the rest.

Files are checked before torch is imported: what is wrong with them is told within a second, and the server answers
HTTP meanwhile.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.engine.adapters import find_adapters
from app.engine.family import Family
from app.engine.folders import NAMES, Kind, ModelFolder, is_model_folder, read_folder
from app.engine.libraries import import_libraries
from app.engine.ranks import Ranks
from app.engine.single_files import SingleFile, Source, read_single_file
from app.errors import ModelLoadFailed
from app.settings import Settings
from app.start import Timeline, importing

logger = logging.getLogger(__name__)

DEMO = "demo"
DEMO_WEIGHTS = Path(__file__).parents[1] / "demo" / "weights"
DEFAULT_FLUX = "black-forest-labs/FLUX.1-schnell"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Report = Callable[[str], None]


def load_family(
    settings: Settings,
    report: Report = lambda _: None,
    timeline: Timeline | None = None,
    ranks: Ranks | None = None,
) -> Family[Any]:
    """Load the model that `settings` name, on its device.

    Args:
        settings: what to load and where to.
        report: hears what is being done, such as ``reading unet (1.2 of 5.1 GB)``; the log hears it too.
        timeline: of the start, for the seconds that it takes.
        ranks: which of several processes this is, each of which loads the model and takes a share of its work.

    Raises:
        ModelLoadFailed: with one sentence that names the folder or file and what to do.
    """

    def say(phase: str) -> None:
        logger.info("%s", phase)
        report(phase)

    timeline = timeline or Timeline()
    say("checking files")
    with timeline.phase("read"):
        base, rest, refiner = _find(settings, say)
    if settings.step_cache > 1 and base.kind is not Kind.FLUX:
        raise ModelLoadFailed("--step_cache is for FLUX alone; leave it out for Stable Diffusion XL.")
    if ranks is not None and base.kind is not Kind.FLUX:
        raise ModelLoadFailed(
            f"{base.path} holds {NAMES[base.kind]}, but only FLUX can be shared by several processes; start it without "
            "torchrun, and with --replicas auto for several GPUs."
        )
    if not settings.use_refiner and (settings.refiner_id or settings.refiner_single_file_model):
        logger.warning("a refiner is named but not loaded; --use_refiner loads it")
    for prefix in ("", "refiner_"):
        if getattr(settings, f"{prefix}config_dir") and not getattr(settings, f"{prefix}single_file_model"):
            logger.warning("--%sconfig_dir has no effect: it is for --%ssingle_file_model alone", prefix, prefix)

    say("importing torch")
    with importing("torch"):
        import_libraries(filter(None, (base, rest, refiner)), compiles=settings.compiles)

    from app.engine.assembling import assemble

    return assemble(settings, base, rest, refiner, say, timeline, ranks)


# --- Which weights ---------------------------------------------------------------------------------------------


def _find(settings: Settings, report: Report) -> tuple[Source, ModelFolder | None, Source | None]:
    """The base, the rest of a FLUX model of which the base is a part, and the refiner."""
    try:
        find_adapters(settings.lora)  # first: a base may have to be downloaded
        base = find_base(settings, report)
        rest = None
        if isinstance(base, SingleFile) and base.kind is Kind.FLUX:
            rest = _rest_of_flux(settings, base, report)
        refiner = find_refiner(settings, base, report) if settings.use_refiner else None
        return base, rest, refiner
    except OSError as error:
        raise ModelLoadFailed(
            f"{error.filename} cannot be read ({error.strerror}); give the user of this server the right to read it."
        ) from None


def find_base(settings: Settings, report: Report) -> Source:
    """The model that the settings name, checked as far as that goes without reading weights.

    Raises:
        ModelLoadFailed: there is none, it is broken, or it is not of the type that was asked for.
    """
    if settings.single_file_model is not None:
        near = _near(settings.model_id, "sdxl", "flux")
        source: Source = read_single_file(settings.single_file_model, settings.config_dir, "config_dir", near)
    else:
        source = read_folder(find_folder(settings, report), full_precision=settings.dtype == "float32")
    if source.kind is Kind.REFINER:
        raise ModelLoadFailed(
            f"{source.path} holds an SDXL refiner, which cannot begin a picture; name the base model here and the "
            "refiner with --use_refiner and --refiner_id or --refiner_single_file_model."
        )
    if settings.model_type not in ("auto", source.kind):
        raise ModelLoadFailed(
            f"{source.path} holds {NAMES[source.kind]}, but --model_type is {settings.model_type}; leave --model_type "
            "out, or name another model."
        )
    return source


def find_folder(settings: Settings, report: Report) -> Path:
    """The folder of the model, downloaded where the settings name one on the hub.

    Raises:
        ModelLoadFailed: there is none.
    """
    model_id, folder = settings.model_id, Path(settings.model_id)
    if model_id == DEMO:
        return DEMO_WEIGHTS / ("flux" if settings.model_type == "flux" else "sdxl")
    nothing = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if settings.model_type == "flux" and nothing and model_id == Settings.model_fields["model_id"].default:
        logger.info("nothing is mounted at %s: taking %s from the hub", folder, DEFAULT_FLUX)
        return _download(settings, DEFAULT_FLUX, report)
    if settings.model_type == "flux" and "model_id" not in settings.model_fields_set and not is_model_folder(folder):
        raise ModelLoadFailed(
            f"--model_type is flux, but {folder} holds no model in diffusers' layout; name the folder of one with "
            f"--model_id, or fetch one from the hub with --model_id {DEFAULT_FLUX}."
        )
    return _resolve(settings, model_id, "model_id", report)


def find_refiner(settings: Settings, base: Source, report: Report) -> Source:
    """The refiner that the settings name, checked likewise.

    Raises:
        ModelLoadFailed: none is named, it is broken, or it is no refiner.
    """
    if base.kind is not Kind.SDXL:
        raise ModelLoadFailed(f"--use_refiner is for SDXL, but {base.path} holds {NAMES[base.kind]}; leave it out.")
    refiner_id = settings.refiner_id or (DEMO if settings.model_id == DEMO else None)
    if settings.refiner_single_file_model is not None:
        path, config = settings.refiner_single_file_model, settings.refiner_config_dir
        source: Source = read_single_file(path, config, "refiner_config_dir", _near(refiner_id, "refiner"))
    else:
        if refiner_id is None:
            raise ModelLoadFailed(
                "--use_refiner needs a refiner; name one with --refiner_id or --refiner_single_file_model."
            )
        if refiner_id == DEMO:
            folder = DEMO_WEIGHTS / "refiner"
        else:
            folder = _resolve(settings, refiner_id, "refiner_id", report)
        source = read_folder(folder, full_precision=settings.dtype == "float32")
    if source.kind is not Kind.REFINER:
        raise ModelLoadFailed(
            f"{source.path} holds {NAMES[source.kind]} and no refiner; name it with --model_id or --single_file_model "
            "if it is the model that begins."
        )
    return source


def _near(name: str | None, *demos: str) -> tuple[Path, ...]:
    """Folders that may configure a single file besides which `name` is given."""
    if name == DEMO:
        return tuple(DEMO_WEIGHTS / demo for demo in demos)
    return (Path(name),) if name is not None and Path(name).is_dir() else ()


def _resolve(settings: Settings, name: str, flag: str, report: Report) -> Path:
    """A folder by its path or, where there is none, by its name on the hub."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not folder.exists() and HUB_NAME.fullmatch(name):
        return _download(settings, name, report)
    what = "is not a folder" if folder.exists() else "does not exist"
    other = "try the small demo model with --model_id demo" if flag == "model_id" else "leave --use_refiner out"
    hint = " (a single file is named with --single_file_model)" if folder.is_file() and flag == "model_id" else ""
    kind = "model" if flag == "model_id" else "refiner"
    raise ModelLoadFailed(
        f"The {kind} folder {name} {what}{hint}; mount a model there, name another one with --{flag}, or {other}."
    )


def _download(settings: Settings, name: str, report: Report, without_weights: frozenset[str] = frozenset()) -> Path:
    from app.engine.hub import download

    token = settings.huggingface_token.get_secret_value() if settings.huggingface_token else None
    full_precision = settings.dtype == "float32"
    return download(name, token, report, full_precision=full_precision, without_weights=without_weights)


def _rest_of_flux(settings: Settings, file: SingleFile, report: Report) -> ModelFolder:
    """The folder with what a FLUX transformer alone does not have.

    Raises:
        ModelLoadFailed: none is named, or it is broken.
    """
    transformer = frozenset({"transformer"})
    model_id, folder = settings.model_id, Path(settings.model_id)
    if "model_id" not in settings.model_fields_set and settings.config_dir is not None:
        folder = settings.config_dir
    elif model_id == DEMO:
        folder = DEMO_WEIGHTS / "flux"
    elif not folder.exists() and HUB_NAME.fullmatch(model_id):
        folder = _download(settings, model_id, report, transformer)
    elif not is_model_folder(folder):
        if file.shipped:
            raise ModelLoadFailed(
                f"{file.path} holds the transformer of a FLUX model alone; name the folder or the hub's name of the "
                "whole model, which has the text encoders, tokenizers and VAE, with --model_id."
            )
        folder = file.config
    rest = read_folder(folder, full_precision=settings.dtype == "float32", without_weights=transformer)
    if rest.kind is not Kind.FLUX:
        raise ModelLoadFailed(f"{folder} holds {NAMES[rest.kind]}, but {file.path} is a part of a FLUX model.")
    return rest
