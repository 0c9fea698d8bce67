"""Calls a step directly while nobody listens to it. What torch puts around it takes 7 µs, longer than a small step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._compile import _disable_dynamo
from torch.optim import optimizer as torchs

from lucid import engine

if TYPE_CHECKING:
    from .optimizer import Optimizer

R = TypeVar("R")


def hooked(step: Callable[..., R]) -> Callable[..., R]:
    """Wrap a class's ``step`` as ``torch.optim.Optimizer.profile_hook_step`` does.

    Torch's wrapper runs if there are hooks, of the optimizer or global, or if anything records the step (a profiler, an
    execution trace).
    """
    import torch._dynamo  # as torch does when it adds the first group

    heard = _disable_dynamo(torch.optim.Optimizer.profile_hook_step(step))

    @functools.wraps(step)
    def unheard(self: Optimizer, *args: Any, **kwargs: Any) -> R:
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torchs._global_optimizer_pre_hooks
            or torchs._global_optimizer_post_hooks
            or engine.cpu.is_recorded()
            or get_eval_frame_callback() is not None
        ):
            return heard(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    return torch._dynamo.decorators.skip(unheard)
