"""Step in backward: each parameter is updated when its gradient is complete, and the gradient let go."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
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

    Neither a hook nor this holds the optimizer; when it is dropped, the hooks are taken away.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._parts: dict[Tensor, Part] = {}
        self._warned = False
        weakref.finalize(self, _remove, self._handles).atexit = False
        self.follow(optimizer)

    def follow(self, optimizer: Optimizer) -> None:
        """Have hooks on all parameters that require gradients now, and on no others; leaves only have such hooks."""
        params = {param: None for group in optimizer.param_groups for param in group["params"]}
        gone = [param for param in self._handles if param not in params]
        if gone:
            optimizer._settle()
        for param in gone:
            self._handles.pop(param).remove()
            for known in (self._parts, optimizer._seen, optimizer._skipped_alone):
                known.pop(param, None)
        own = weakref.ref(self)

        def hook(param: Tensor) -> None:
            this = own()
            if this is not None:
                this._ready(param)

        for param in params:
            if param.requires_grad and param.is_leaf and param not in self._handles:
                self._handles[param] = param.register_post_accumulate_grad_hook(hook)

    def remove(self) -> None:
        """Take the hooks away."""
        _remove(self._handles)

    def after_step(self, optimizer: Optimizer) -> None:
        """Let the gradients go that `step` has used; hook what was added or unfrozen."""
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = None
        self.follow(optimizer)

    @_disable_dynamo
    def _ready(self, param: Tensor) -> None:
        """Update `param`, to whose gradient backward has added all that it adds."""
        optimizer = self._optimizer()
        if optimizer is None or optimizer._accumulating or param.grad is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._leave_to_step()
            return
        part = self._part(optimizer, param)
        if part is None:
            return
        entry = optimizer._state_box[0].get(param)
        try:
            outcome = optimizer._apart(part, [{} if entry is None else {param: entry}, True])
        except BaseException:
            if part.updated:
                param.grad = None  # used, whatever happened then
            raise
        param.grad = None
        if outcome.skipped:
            optimizer._left_out_in_backward(param, 1)
        optimizer._seen |= outcome.observed

    def _leave_to_step(self) -> None:
        """Which process averages what, and when, cannot be seen from here: DDP does it after the hooks."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "step_in_backward() does nothing while a process group is initialised: gradients may be averaged "
                "after backward has computed them; step() updates everything, as without it",
                RuntimeWarning,
                stacklevel=4,
            )

    def _part(self, optimizer: Optimizer, param: Tensor) -> Part | None:
        """The part that is `param` alone; None where it was taken out of the groups."""
        groups = optimizer.param_groups
        part = self._parts.get(param)
        if part is not None and part.only is not None:
            group, place = part.only
            if group < len(groups) and place < len(groups[group]["params"]) and groups[group]["params"][place] is param:
                return part
        places = {member.param: (member.group, member.place) for member in members_of(groups)}
        if param not in places:
            return None
        optimizer._settle()  # what parts before have left to a device
        self._parts |= {other: Part(where, other) for other, where in places.items()}  # all at once: each reads all
        return self._parts[param]


def _remove(handles: dict[Tensor, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
