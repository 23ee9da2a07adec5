"""One FLUX transformer on several GPUs: each of torchrun's processes does its share of every forward pass.

The first process serves and the others follow it. Before each pass it tells them what comes, and sends it; then every
process takes a part of the tokens through the transformer, and for each attention they exchange tokens for heads
(diffusers' context parallelism, in the way of Ulysses).
"""

from __future__ import annotations

import contextlib
import datetime
import logging
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from torch.distributed.device_mesh import init_device_mesh

from app.engine.adapters import Adapters
from app.engine.faults import LOST
from app.engine.ranks import Ranks
from app.errors import DeviceLost, ModelLoadFailed
from app.settings import Settings

logger = logging.getLogger(__name__)

FOR_EVER = datetime.timedelta(days=3650)
"""How long the others wait for the next pass: nobody may ask for a picture for weeks."""
SPLIT = ("hidden_states", "encoder_hidden_states")
"""Inputs ``[n, tokens, c]`` whose tokens are shared out."""


def own_device(settings: Settings, ranks: Ranks) -> Settings:
    """The settings with the GPU of this process.

    Raises:
        ModelLoadFailed: there are fewer GPUs than processes.
    """
    count = torch.cuda.device_count()
    if settings.device == "cpu" or (settings.device == "auto" and count == 0):
        return settings
    if ranks.local_rank >= count:
        raise ModelLoadFailed(
            f"torchrun started a process for GPU {ranks.local_rank}, counted from 0, but {count} are visible here; "
            "lower --nproc_per_node, or take --device cpu."
        )
    return settings.model_copy(update={"device": f"cuda:{ranks.local_rank}"})


def check_heads(heads: int, size: int) -> None:
    """Whether so many processes can share an attention of so many heads.

    Raises:
        ModelLoadFailed: they cannot.
    """
    if heads % size:
        fitting = ", ".join(str(count) for count in range(2, heads + 1) if heads % count == 0)
        raise ModelLoadFailed(
            f"torchrun started {size} processes, but the {heads} attention heads of this model can be shared by "
            f"{fitting}; give one of these as --nproc_per_node."
        )


class Parallel:
    """What the processes share; stands in for the transformer in the first of them.

    Args:
        ranks: which of them this is.
        device: of this one.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        # By device: diffusers looks for "cpu" in it, and without takes for granted that a torch with CUDA has a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo")
        # Over the network alone, so that who waits here does not keep a GPU busy.
        self._control = dist.new_group(backend="gloo", timeout=FOR_EVER)
        self._transformer: Any = None
        self._adapters: Adapters | None = None
        self._config = ContextParallelConfig(ulysses_degree=ranks.size)

    @property
    def size(self) -> int:
        """Processes; each needs a token at least."""
        return self._ranks.size

    def split(self, transformer: Any, adapters: Adapters | None) -> None:
        """Have each process compute its share of `transformer`, which all of them have loaded in full.

        Raises:
            ModelLoadFailed: it has no such shares.
        """
        check_heads(transformer.config.num_attention_heads, self.size)
        # What `enable_parallelism` does, which takes an accelerator for granted; without its last part, for which all
        # shares have to be equal on a CPU: see `_gather`.
        mesh = init_device_mesh(self._device.type, self._config.mesh_shape, mesh_dim_names=self._config.mesh_dim_names)
        config = ParallelConfig(context_parallel_config=self._config)
        config.setup(self._ranks.rank, self.size, self._device, mesh=mesh)
        for module in transformer.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "_parallel_config"):
                processor._parallel_config = config
        apply_context_parallel(transformer, self._config, {"": transformer._cp_plan[""]})
        self._transformer, self._adapters = transformer, adapters

    def wait(self) -> None:
        """Until every process has come so far."""
        dist.barrier(group=self._control)

    def __call__(self, **inputs: Any) -> tuple[torch.Tensor]:
        """One forward pass, which the first process starts and all take part in.

        Args:
            inputs: the transformer's; what is no tensor is left out.

        Returns:
            What the whole transformer would.

        Raises:
            DeviceLost: somebody failed, and the others may wait for ever in the middle of the pass.
        """
        tensors = {name: value.contiguous() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        loras = self._adapters.active if self._adapters is not None else ()
        try:
            self._tell((loras, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}))
            for tensor in tensors.values():
                dist.broadcast(tensor, src=0)
            return (self._pass(tensors),)
        except Exception as error:
            logger.critical("a forward pass that several processes share failed", exc_info=error)
            lost = DeviceLost(LOST)
        raise lost

    def follow(self) -> None:
        """Take part in every pass that the first process starts, until it says goodbye.

        Raises:
            Exception: it is gone without that, or the pass failed; this process is of no use any more.
        """
        while (told := self._tell(None)) is not None:
            loras, layouts = told
            if self._adapters is not None:
                self._adapters.activate(loras)
            tensors = {}
            for name, (shape, dtype) in layouts.items():
                tensors[name] = torch.empty(shape, dtype=dtype, device=self._device)
                dist.broadcast(tensors[name], src=0)
            self._pass(tensors)
        dist.destroy_process_group()

    def close(self) -> None:
        """Say goodbye to the others, which end then."""
        with contextlib.suppress(Exception):  # somebody may be gone already
            self._tell(None)
            dist.destroy_process_group()

    def _tell(self, message: Any) -> Any:
        """What the first process says to all others, and what they hear."""
        messages = [message]
        dist.broadcast_object_list(messages, src=0, group=self._control)
        return messages[0]

    def _pass(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        # Shares that differ cost one more exchange, of their lengths, for each attention.
        self._config.ulysses_anything = any(tensors[name].shape[1] % self.size for name in SPLIT)
        share = self._transformer(**tensors, return_dict=False)[0]
        return self._gather(share, tensors["hidden_states"].shape[1])

    def _gather(self, share: torch.Tensor, tokens: int) -> torch.Tensor:
        """The whole result of a pass, ``[n, tokens, c]``, from this process's `share` and those of the others."""
        each, more = divmod(tokens, self.size)
        longest = each + (more > 0)
        # Not every backend gathers what differs in length.
        share = torch.nn.functional.pad(share, (0, 0, 0, longest - share.shape[1])).contiguous()
        shares = [torch.empty_like(share) for _ in range(self.size)]
        dist.all_gather(shares, share)
        return torch.cat([part[:, : each + (rank < more)] for rank, part in enumerate(shares)], dim=1)
