"""Step in backward: each parameter is updated when its gradient is complete, and the gradient let go."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .part import Part, members_of

if TYPE_CHECKING:
    from .optimizer import Optimizer


def no_norm_in_backward(bound: float) -> str:
    """Say why a norm cannot be bounded in backward."""
    return (
        f"max_grad_norm={bound:g} cannot be kept in backward: the norm of all gradients is known after the last one, "
        "and the first parameters are updated before that; set max_grad_norm=None, or step_in_backward(False)"
    )


class StepInBackward:
    """The hooks on an optimizer's parameters, and the part that each of them is.

    Neither a hook nor this holds the optimizer: it may be dropped, and its hooks do nothing from then on.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._parts: dict[Tensor, Part] = {}
        self._ending = -1  # the backward at whose end everything is updated
        self._add_hooks(optimizer)

    def _add_hooks(self, optimizer: Optimizer) -> None:
        """To parameters that have none: all at first, those that were added or unfrozen later."""
        own = weakref.ref(self)

        def hook(param: Tensor) -> None:
            this = own()
            if this is not None:
                this._ready(param)

        for group in optimizer.param_groups:
            for param in group["params"]:
                if param not in self._handles and param.requires_grad:
                    self._handles[param] = param.register_post_accumulate_grad_hook(hook)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _ready(self, param: Tensor) -> None:
        """Update `param`, to whose gradient backward has added all that it adds."""
        optimizer = self._optimizer()
        if optimizer is None or optimizer._accumulating or param.grad is None:
            return
        if _several_processes():
            self._step_at_the_end()
            return
        part = self._part(optimizer, param)
        if part is None:
            return
        entry = optimizer._state_box[0].get(param)
        state_box = [{} if entry is None else {param: entry}, True]
        outcome = optimizer._apart(part, state_box)
        if outcome.skipped:
            optimizer._skipped_alone[param] = optimizer._skipped_alone.get(param, 0) + 1
        optimizer._seen |= outcome.observed
        param.grad = None

    def _part(self, optimizer: Optimizer, param: Tensor) -> Part | None:
        """The part that is `param` alone; None where it was taken out of the groups."""
        groups = optimizer.param_groups
        part = self._parts.get(param)
        if part is not None and part.only is not None:
            group, place = part.only.group, part.only.place
            if group < len(groups) and place < len(groups[group]["params"]) and groups[group]["params"][place] is param:
                return part
        for member in members_of(groups):
            if member.param is param:
                self._parts[param] = Part(member)
                return self._parts[param]
        return None

    def _step_at_the_end(self) -> None:
        """Once for each backward: until its end, gradients are those of this process alone."""
        current = torch._C._current_graph_task_id()
        if self._ending == current:
            return
        self._ending = current
        engine = torch.autograd.Variable._execution_engine

        def step() -> None:
            optimizer = self._optimizer()
            if optimizer is not None:
                optimizer.step()

        engine.queue_callback(lambda: engine.queue_callback(step))  # behind what DDP has queued meanwhile

    def after_step(self, optimizer: Optimizer) -> None:
        """Let the gradients go that `step` has used, which came without a hook or while accumulating."""
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = None
        self._add_hooks(optimizer)


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
