"""Importing torch, diffusers and transformers: what loading and painting take of them, at once, and little more.

They import when one looks at their names, so otherwise the first request would wait for some of it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from app.engine.folders import Kind
from app.engine.single_files import SingleFile, Source


def import_libraries(sources: Iterable[Source], compiles: bool) -> None:
    """Import all that the models take, and quieten the libraries.

    Args:
        sources: of weights.
        compiles: the models will be compiled.
    """
    # Read once, when diffusers is imported: the files that a model is spread over are read side by side.
    os.environ.setdefault("HF_ENABLE_PARALLEL_LOADING", "true")
    _look_for_models_once()
    _quieten()
    _leave_scipy_for_later()

    from app.engine import adapters, placement  # noqa: F401
    from app.engine.loading import component_class

    if compiles:
        from app.engine import compiled  # noqa: F401
    for source in sources:
        if source.kind is Kind.FLUX:
            from app.engine import flux  # noqa: F401
        else:
            from app.engine import sdxl  # noqa: F401
        if isinstance(source, SingleFile):
            from app.engine import converting  # noqa: F401
        else:
            for component in source.components.values():
                component_class(component)


class _Later(ModuleType):
    """Stands for a module until somebody uses what is in it."""

    def __getattr__(self, name: str) -> Any:
        # Others that begin so are asked of every module, by who looks for one; the path, by who imports a part of this.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def _look_for_models_once() -> None:
    """Have transformers remember which classes it has.

    When imported it looks for them in the source of all its models, and again when its first model is, by the same path
    in another form.
    """
    from transformers.utils import import_utils

    look = getattr(import_utils, "create_import_structure_from_path", None)
    if look is not None and "transformers.models" not in sys.modules:
        import_utils.create_import_structure_from_path = lambda path: look(_folder(Path(path)))


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _leave_scipy_for_later() -> None:
    """Import it when a request wants it: it would take a third of a second of each start.

    Diffusers' schedulers take it for the noise levels of a beta distribution and for LMS, transformers for the training
    of models that find objects.
    """
    for name in ("scipy.stats", "scipy.integrate"):
        sys.modules.setdefault(name, _Later(name))
    import transformers.utils

    transformers.utils.is_scipy_available = lambda: False
    try:
        import transformers.modeling_utils
    finally:
        # Not what was there before: several models may be loaded at once.
        transformers.utils.is_scipy_available = transformers.utils.import_utils.is_scipy_available


def _quieten() -> None:
    """Both libraries draw progress bars, give advice, and log prompts that are too long word for word."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
