"""Step in backward: each parameter is updated when its gradient is complete, and then the gradient is released."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lucid import engine
from lucid.engine.told import warn

from .atomic_step import AtomicStep
from .fsdp import Sharded
from .groups import ParamGroup
from .left_to_step import LeftToStep
from .members import members, params_of
from .unheard import outside_graphs


def no_norm_in_backward(option: str, value: float) -> str:
    """Return the error message for an option that needs the gradient norm in backward."""
    return (
        f"{option}={value:g} does not work in backward: the gradient norm is known after the last gradient, and "
        f"the first parameters are updated before that; set {option}=None, or call step_in_backward(False)"
    )


NO_SKIP = (
    'nonfinite="skip" does not work in backward under FSDP2: the processes would have to ask each other before each '
    'update, so that all of them skip; use "propagate" or "error", or call step_in_backward(False)'
)


class UpdatesAlone(Protocol):
    """An optimizer, as hooks see it."""

    def _step_alone(self, param: Tensor) -> None:
        """Update a parameter whose gradient is complete."""


class StepInBackward:
    """The hooks on an optimizer's parameters, and an `AtomicStep` for each parameter.

    ``ready``: the optimizer, which updates a parameter whose gradient is complete. Neither a hook nor this object holds
    a reference to it; when this object is deleted, its hooks are removed. ``sharded``: what FSDP2 shards of the model
    that the user has given. ``left``: what the hooks of these parameters leave to `step`, None if there are none.
    """

    def __init__(self, ready: weakref.ref[UpdatesAlone]) -> None:
        self._ready = ready
        self._handles: dict[Tensor, RemovableHandle] = {}
        self.steps: dict[Tensor, AtomicStep] = {}
        self.sharded = Sharded()
        self.left: LeftToStep | None = None
        self._warned = False
        weakref.finalize(self, _remove, self._handles).atexit = False

    def follow(self, groups: list[ParamGroup]) -> list[Tensor]:
        """Add hooks to new parameters that require gradients; remove those of removed parameters, and return these.

        Only leaf tensors can have such hooks.
        """
        self.sharded.follow()
        params = dict.fromkeys(params_of(groups))
        gone = [param for param in self._handles if param not in params]
        for param in gone:
            self._handles.pop(param).remove()
            self.steps.pop(param, None)
        ready = self._ready

        @outside_graphs
        def hook(param: Tensor) -> None:
            optimizer = ready()
            if optimizer is not None:
                optimizer._step_alone(param)

        for param in params:
            if param.requires_grad and param.is_leaf and param not in self._handles:
                self._handles[param] = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return gone

    def remove(self) -> None:
        """Remove the hooks."""
        _remove(self._handles)
        self.sharded.remove()

    def tell(self, sharded: Sharded) -> None:
        """Replace what is known of parameters that FSDP2 shards; what hooks have left to `step` so far stays."""
        self.sharded.remove()
        self.sharded = sharded
        self.left = (self.left or LeftToStep()) if sharded.params else None

    def leaves_to_step(self, param: Tensor) -> bool:
        """Whether a hook must do nothing because `step` updates its parameter.

        While a process group is initialized, a hook cannot see which process averages which gradient, and when: DDP
        averages after the hooks. FSDP2 has averaged before it calls the hooks of its parameters.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return False
        if param in self.sharded.params:
            return not self.sharded.completes(param)
        if not self.sharded.params and not self._warned:
            self._warned = True
            warn(
                "step_in_backward() does nothing while a process group is initialized, because gradients may be "
                "averaged after backward has computed them; step() updates everything, as without step_in_backward(). "
                "With FSDP2, call step_in_backward(model=model)",
                RuntimeWarning,
            )
        return True

    def step_of(self, param: Tensor, groups: list[ParamGroup], confirm: Callable[[], None]) -> AtomicStep | None:
        """Return the step of `param` alone, or None if the groups no longer contain it.

        ``confirm``: confirms the step counts of the existing steps; called before new steps replace them.
        """
        step = self.steps.get(param)
        if step is not None and step.only is not None:
            group, place = step.only
            if group < len(groups) and place < len(groups[group]["params"]) and groups[group]["params"][place] is param:
                return step
        places = {member.param: (member.group, member.place) for member in members(groups)}
        if param not in places:
            return None
        confirm()
        # All at once, because one pass over the groups finds the place of every parameter.
        self.steps |= {other: AtomicStep(where, other) for other, where in places.items()}
        return self.steps[param]


def record_stream(gradient: Tensor) -> None:
    """Keep the memory of a gradient, which FSDP2 may have allocated on another stream, until the update has read it."""
    shard = engine.shards.local(gradient)
    if shard.is_cuda:
        shard.record_stream(torch.cuda.current_stream(shard.device))


def _remove(handles: dict[Tensor, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
