"""The loop that every model is trained in. It knows a module and a loss, and nothing of pictures."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Sequence
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


def adam(module: torch.nn.Module, peak: float, weight_decay: float = 0.0) -> list[torch.optim.Optimizer]:
    """AdamW for all that requires gradients."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [torch.optim.AdamW(parameters, lr=peak, weight_decay=weight_decay)]


def fit(
    module: M,
    loss_of_batch: Callable[[], torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    name: str,
    steps: int,
    average: float,
    after: Callable[[int, M], None] | None = None,
) -> M:
    """Minimise a loss over a one-cycle schedule.

    Args:
        module: what is trained.
        loss_of_batch: draws a batch and says how wrong `module` is about it.
        optimizers: of the module's parameters; their learning rates are the largest of the cycle.
        name: beside the progress bar.
        steps: batches.
        average: decay of the average of the weights.
        after: hears of every step and the average so far.

    Returns:
        The average of the weights.
    """
    parameters = [each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]]
    # AdamW's momentum goes against its learning rate; Muon's stays.
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            optimizer.param_groups[0]["lr"],
            total_steps=steps,
            pct_start=0.08,
            cycle_momentum="betas" in optimizer.defaults,
        )
        for optimizer in optimizers
    ]
    best = Average(module, average)
    losses: collections.deque[float] = collections.deque(maxlen=200)
    for step in (bar := tqdm(range(steps), desc=name)):
        loss = loss_of_batch()
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        best.update(module, step)
        losses.append(loss.item())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
        if after is not None:
            after(step, best.module)
    return best.module
