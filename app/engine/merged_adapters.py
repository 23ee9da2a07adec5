"""LoRA adapters for a model that is compiled: added to its weights in place, and taken out again.

Layers of adapters beside the model's own would have to be compiled anew for each set of them. So the weights that
adapters change are kept a second time, and what was compiled never notices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from app.engine.adapters import Adapters, Loras
from app.errors import ModelLoadFailed

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer that adapters change.

    Attributes:
        weight: as the model computes with it, ``[out, in]`` or a convolution's.
        original: a copy.
        adapter: knows what each adapter adds.
        names: of the adapters.
    """

    weight: torch.nn.Parameter
    original: torch.Tensor
    adapter: Any
    names: frozenset[str]


class MergedAdapters(Adapters):
    """The adapters that a pipeline has loaded, taken out of it.

    Args:
        pipeline: on its device; afterwards it is as if it had loaded none.
        scales: the server's own scale of each.

    Raises:
        ModelLoadFailed: one of them is of a kind that cannot be added to weights.
    """

    def __init__(self, pipeline: Any, scales: Mapping[str, float]) -> None:
        super().__init__(pipeline, scales)
        self._layers = [
            layer for name in PARTS if (part := getattr(pipeline, name, None)) is not None for layer in _take_out(part)
        ]
        self._active = ()

    @torch.no_grad()
    def activate(self, loras: Loras) -> None:
        if loras == self._active:
            return
        # Where memory ended in between, any layer may hold anything.
        unknown = self._active is None
        changed = {name for name, _ in (*loras, *(self._active or ()))}
        self._active = None
        for layer in self._layers:
            if unknown or layer.names & changed:
                weight = layer.original
                for name, scale in loras:
                    if name in layer.names:
                        added = layer.adapter.get_delta_weight(name).float() * (scale * self.scales[name])
                        weight = weight.float() + added
                layer.weight.copy_(weight)
        self._active = loras


def _take_out(part: torch.nn.Module) -> list[_Layer]:
    """Put the model's own layers back in the places of those that adapters have wrapped."""
    layers = []
    for parent in list(part.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, BaseTunerLayer):
                continue
            layer: Any = child
            names = frozenset(layer.lora_A.keys())
            for what, kinds in (("is a DoRA", layer.use_dora), ("has biases", layer.lora_bias)):
                if any(kinds.get(each) for each in names):
                    raise ModelLoadFailed(
                        f"An adapter of --lora {what}, which does not go with --optimize compile or max; take "
                        "--optimize safe."
                    )
            own = layer.get_base_layer()
            setattr(parent, name, own)
            layers.append(_Layer(own.weight, own.weight.detach().clone(), layer, names))
    return layers
