"""Calls a step, and the hooks of backward, directly while nobody listens.

What torch puts around each step, for hooks, profilers and torch.compile, takes as long as a step of a small tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch._compile import _disable_dynamo
from torch.optim import optimizer as torchs

from lucid import engine

try:
    from torch._C._dynamo.eval_frame import get_eval_frame_callback  # None where torch.compile does not run
except ImportError:  # a torch that has renamed it: as if torch.compile ran everywhere

    def get_eval_frame_callback() -> Any:  # type: ignore[misc]
        return False


P = ParamSpec("P")
R = TypeVar("R")


def hooked(func: Callable[P, R]) -> Callable[P, R]:
    """Wrap a class's ``step`` as ``torch.optim.Optimizer.profile_hook_step`` does.

    Torch's wrapper runs if there are hooks, of the optimizer or global, if anything records the step (a profiler, an
    execution trace), or where torch.compile runs, which leaves the step alone. It also runs if the step is called with
    a closure, which may add hooks.
    """
    heard = _disable_dynamo(torchs.Optimizer.profile_hook_step(func))

    @functools.wraps(func)
    def unheard(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            (args and args[0] is not None)
            or kwargs
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torchs._global_optimizer_pre_hooks
            or torchs._global_optimizer_post_hooks
            or engine.cpu.is_recorded()
            or get_eval_frame_callback() is not None
        ):
            return heard(self, *args, **kwargs)
        return func(self, *args, **kwargs)

    return _skipped(unheard)


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that torch.compile leaves alone, as ``torch._disable_dynamo`` does but at no cost."""
    disabled = _disable_dynamo(function)

    @functools.wraps(function)
    def direct(*args: P.args, **kwargs: P.kwargs) -> R:
        if get_eval_frame_callback() is not None:
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return _skipped(direct)


def _skipped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tell torch.compile not to look into a function, though into those that it calls."""
    from torch._dynamo import eval_frame  # late, because it takes a second; torch does so when it adds the first group

    if hasattr(eval_frame, "skip_code"):
        eval_frame.skip_code(function.__code__)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function
