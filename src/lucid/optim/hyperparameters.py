"""The hyperparameters of a group, checked, as a step uses them."""

from __future__ import annotations

from operator import is_, itemgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lucid import engine
from lucid.engine.formats import StateFormat, StateFormatName, checked_format
from lucid.engine.values import checked_lr, shown

from .groups import ParamGroup, checked_params


class Hyperparameters(NamedTuple):
    """A group's hyperparameters, checked."""

    lr: float | Tensor  # a tensor only if the group was read with reads=False
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    state_format: StateFormatName
    master_weights: bool
    seed: int

    @property
    def slots_depend_on(self) -> tuple[bool, StateFormatName, bool]:
        """The hyperparameters that decide which slots a parameter's state has."""
        return self.amsgrad, self.state_format, self.master_weights

    def format_of(self, param: Tensor, name: str, device: torch.device | None) -> StateFormat:
        """Return the state format of a parameter of the group; raise if the parameter cannot be updated.

        ``device``: the device of the state, or None for the parameter's.
        """
        return checked_format(param, self.state_format, self.master_weights, name, device)

    def recipe(self, group: int, step: float) -> engine.Recipe:
        """Return the recipe of a step's scalars; ``step`` is counted from 1."""
        return engine.Recipe(group, self.lr, self.beta1, self.beta2, self.eps, self.weight_decay, self.maximize, step)


class Reading(Protocol):
    """The function with which an optimizer reads a group."""

    def __call__(self, group: ParamGroup, *, reads: bool = True) -> Hyperparameters:
        """Return the group's hyperparameters; raise if one is out of range.

        `reads`: whether to read the value of a learning rate tensor, which waits for the tensor's device.
        """


_ALL_BUT_LR = itemgetter(*Hyperparameters._fields[1:])
_CONSTANT = (float, int, bool, str)  # a value of these types stays what it is


def known(group: ParamGroup, read: Reading) -> Hyperparameters:
    """Return the group's hyperparameters, without checking again what is still the same object; lr may be a tensor."""
    try:
        lr, values = group["lr"], _ALL_BUT_LR(group)
    except KeyError:
        return read(group, reads=False)  # it raises and says what is missing
    if group.known is None or not all(map(is_, values, group.known[0])):
        found = read(group, reads=False)
        group.known = (values, found) if all(type(value) in _CONSTANT for value in values) else None
        return found
    found = group.known[1]
    if lr is not found.lr:  # as a scheduler sets it at each step
        found = Hyperparameters(lr if isinstance(lr, Tensor) else checked_lr(lr), *found[1:])
        group.known = values, found
    return found


def checked_groups(groups: list[ParamGroup], read: Reading, only: int | None = None) -> list[ParamGroup]:
    """Return all groups, or only group `only`; groups that somebody has replaced by plain dicts are wrapped again."""
    if not isinstance(groups, list):
        raise TypeError(f"param_groups: expected a list of dicts, got {shown(groups)}")
    for index in range(len(groups)) if only is None else (only,):
        group = groups[index]
        if type(group) is ParamGroup and type(dict.get(group, "params")) is list:
            continue
        if not isinstance(group, dict):
            raise TypeError(f"param_groups[{index}]: expected a dict, got {shown(group)}")
        wrapped = ParamGroup(group)
        wrapped["params"], _ = checked_params(group.get("params"))
        read(wrapped)
        if type(group) is ParamGroup:
            group["params"] = wrapped["params"]
        else:
            groups[index] = wrapped
    return groups if only is None else [groups[only]]
