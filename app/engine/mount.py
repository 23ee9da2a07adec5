"""Waiting for a model's files that are mounted after the server has started.

KServe mounts a model image (``oci://``) by a second container: ``/mnt/models`` is then a symbolic link into that
container's ``/proc/PID/root``, and appears when it is there. Nothing here reads a model.

Source: KServe ``pkg/webhook/admission/pod`` (modelcar) and ``pkg/utils/storage.go``, which sets ``MODEL_INIT_MODE``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from app.engine.adapters import parse_reference
from app.errors import ModelLoadFailed
from app.settings import Settings

logger = logging.getLogger(__name__)

MOUNT = Path("/mnt/models")
DEFAULT_TIMEOUT = 60.0
POLL_SECONDS = 0.2


def wait_for_mount(settings: Settings, report: Callable[[str], None]) -> None:
    """Return once everything that the settings name is there, at once where there is nothing to wait for.

    Args:
        settings: which paths, and how long; see ``mount_timeout``.
        report: hears what is waited for.

    Raises:
        ModelLoadFailed: not there in time.
    """
    started = time.monotonic()
    for path in _named_paths(settings):
        patience = _patience(settings, path)
        missing = what_is_missing(path)
        if missing and patience:
            logger.info("waiting up to %g seconds for the mount: %s %s", patience, path, missing)
        while missing and time.monotonic() - started < patience:
            report(f"waiting for the mount, {path} {missing}")
            time.sleep(POLL_SECONDS)
            missing = what_is_missing(path)
        if missing and patience:
            advice = "mount a model there, name another one with --model_id, or try the demo with --model_id demo"
            if path in _adapters(settings):
                advice = "mount the adapter there, or correct --lora"
            raise ModelLoadFailed(
                f"{path} {missing}, after {patience:g} seconds of waiting (the setting mount_timeout); {advice}."
            )


def _named_paths(settings: Settings) -> list[Path]:
    named: list[str | Path | None] = [settings.single_file_model or settings.model_id, settings.config_dir]
    if settings.use_refiner:
        named += [settings.refiner_single_file_model or settings.refiner_id, settings.refiner_config_dir]
    named += _adapters(settings)
    # Whatever is relative is a name on the hub, the demo, or a folder that somebody at a terminal names.
    return [Path(each) for each in named if each is not None and Path(each).is_absolute()]


def _adapters(settings: Settings) -> list[Path]:
    return [parse_reference(reference)[1] for reference in settings.lora]


def _patience(settings: Settings, path: Path) -> float:
    if settings.mount_timeout is not None:
        return settings.mount_timeout
    if path != MOUNT and MOUNT not in path.parents:
        return 0.0
    if settings.model_type == "flux" and path == MOUNT and os.environ.get("MODEL_INIT_MODE") != "async":
        return 0.0  # without a mount, FLUX comes from the hub
    return DEFAULT_TIMEOUT


def what_is_missing(path: Path) -> str:
    """Why there is nothing to read at `path`, as the end of a sentence; empty where there is something."""
    try:
        if not path.exists():
            return "is a link to something that is not there" if path.is_symlink() else "does not exist"
        return "is empty" if path.is_dir() and not any(path.iterdir()) else ""
    except OSError as error:
        # Another container's files cannot be seen before it runs as the same user.
        return f"cannot be read ({os.strerror(error.errno or 0)})"
