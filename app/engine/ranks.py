"""Which of torchrun's processes this is, and what does not go with being one of several. Told without torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

from app.errors import InvalidSettings
from app.settings import Settings

logger = logging.getLogger(__name__)

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Only torchrun sets it; platforms set the other variables for reasons of their own."""
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Ranks:
    """One of several processes that share every forward pass.

    Attributes:
        rank: among all of them; 0 serves, the others follow it.
        local_rank: among those on its machine, each of which has a GPU of its own.
        size: how many there are.
    """

    rank: int
    local_rank: int
    size: int


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """Which of torchrun's processes this is; ``None`` where it is the only one.

    Source: torchrun's documentation, "Environment Variables".

    Raises:
        InvalidSettings: torchrun's variables are damaged.
    """
    if TORCHRUN not in environment:
        if environment.get("WORLD_SIZE", "1") != "1":
            logger.info("WORLD_SIZE is set, but this process was not started by torchrun: it serves on its own")
        return None
    try:
        rank, local_rank, size = (int(environment[name]) for name in NUMBERS)
    except (KeyError, ValueError):
        raise InvalidSettings(
            f"{TORCHRUN} is set as by torchrun, but {', '.join(NUMBERS)} are not all numbers; start the server with "
            f"torchrun, or without {TORCHRUN} in its environment."
        ) from None
    return Ranks(rank, local_rank, size) if size > 1 else None


def check_settings(settings: Settings, ranks: Ranks) -> Settings:
    """The settings of one of several processes: those given, with one copy of the model for all.

    Raises:
        InvalidSettings: one of them does not go with several processes.
    """
    several = f"torchrun started {ranks.size} processes that share one model"
    if settings.model_type == "sdxl":
        raise InvalidSettings(f"{several}, which only FLUX can; for SDXL on several GPUs take --replicas auto instead.")
    if settings.replicas not in (1, "auto"):
        raise InvalidSettings(f"{several}, so --replicas {settings.replicas} cannot be; leave it out.")
    if settings.device not in ("auto", "cuda", "cpu"):
        raise InvalidSettings(
            f"{several}, each on a GPU of its own, so --device {settings.device} cannot be; take auto, cuda or cpu."
        )
    if settings.compiles:
        raise InvalidSettings(f"{several}, which cannot be compiled; take --optimize safe or off.")
    if settings.step_cache > 1:
        raise InvalidSettings(f"{several}, which goes without --step_cache; leave it out.")
    return settings.model_copy(update={"replicas": 1})
