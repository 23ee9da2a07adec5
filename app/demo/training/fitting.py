"""The loop that every model is trained in. It knows a module and a loss, and nothing of pictures."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from tqdm import tqdm

M = TypeVar("M", bound=torch.nn.Module)


class Average(Generic[M]):
    """An exponential average of a module's weights, which paints better than the last step's weights do."""

    def __init__(self, module: M, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


def fit(
    module: M,
    loss_of_batch: Callable[[], torch.Tensor],
    *,
    name: str,
    steps: int,
    peak: float,
    average: float,
    weight_decay: float = 0.0,
    after: Callable[[int, M], None] | None = None,
) -> M:
    """Minimise a loss over a one-cycle schedule.

    Args:
        module: what of it requires gradients is trained.
        loss_of_batch: draws a batch and says how wrong `module` is about it.
        name: beside the progress bar.
        steps: batches.
        peak: largest learning rate.
        average: decay of the average of the weights.
        weight_decay: as AdamW's.
        after: hears of every step and the average so far.

    Returns:
        The average of the weights.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.08)
    best = Average(module, average)
    losses: collections.deque[float] = collections.deque(maxlen=200)
    for step in (bar := tqdm(range(steps), desc=name)):
        loss = loss_of_batch()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        best.update(module, step)
        losses.append(loss.item())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
        if after is not None:
            after(step, best.module)
    return best.module
