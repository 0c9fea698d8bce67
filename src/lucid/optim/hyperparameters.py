"""The hyperparameters of a group, checked, as a step uses them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from lucid import engine
from lucid.engine.formats import MasterWeights, StateDevice, StateFormat, StateFormatName, checked_format
from lucid.engine.values import checked_lr, one_of, shown

from .groups import ParamGroup, add_read, checked_params

WeightDecaySchedule = Literal["lr", "independent"]
SCHEDULES: tuple[WeightDecaySchedule, ...] = ("lr", "independent")
SlotsDependOn = tuple[bool, StateFormatName, MasterWeights, bool]


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
    master_weights: MasterWeights
    seed: int
    reference_lr: float | None
    weight_decay_schedule: WeightDecaySchedule
    cautious_decay: bool
    ema_decay: float | None

    @property
    def slots_depend_on(self) -> SlotsDependOn:
        """The hyperparameters that decide which slots a parameter's state has."""
        return self.amsgrad, self.state_format, self.master_weights, self.ema_decay is not None

    def format_of(
        self, param: Tensor, name: str, state_device: StateDevice | None, *, has_ema: bool = False
    ) -> StateFormat:
        """Return the state format of a parameter of the group; raise if the parameter cannot be updated.

        ``has_ema``: whether its state has an average of the weights, also if steps no longer update it.
        """
        ema = has_ema or self.ema_decay is not None
        return checked_format(param, self.state_format, self.master_weights, name, state_device, ema=ema)

    def with_lr(self, lr: Any) -> Hyperparameters:
        """Return these hyperparameters with another learning rate; raise if it is out of range."""
        return Hyperparameters(lr if isinstance(lr, Tensor) else checked_lr(lr), *self[1:])

    def recipe(self, group: int, step: float) -> engine.Recipe:
        """Return the recipe of a step's scalars; ``step`` is counted from 1."""
        return engine.Recipe(
            group,
            self.lr,
            self.beta1,
            self.beta2,
            self.eps,
            self.weight_decay,
            self.maximize,
            step,
            (self.reference_lr or 0.0) if self.weight_decay_schedule == "independent" else 0.0,
            self.cautious_decay,
            self.ema_decay or 0.0,
        )


add_read(Hyperparameters._fields)


def schedule_of(group: ParamGroup) -> WeightDecaySchedule:
    """Return what the group's weight decay follows; a group that was pickled by an earlier release does not say."""
    return one_of("weight_decay_schedule", group.get("weight_decay_schedule", "lr"), SCHEDULES)


class Reading(Protocol):
    """The function with which an optimizer reads a group."""

    def __call__(self, group: ParamGroup, *, reads: bool = True) -> Hyperparameters:
        """Return the group's hyperparameters; raise if one is out of range.

        `reads`: whether to read the value of a learning rate tensor, which waits for the tensor's device.
        """


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


class Readings:
    """What a step reads from its groups, kept from step to step: a value that a group still holds is not checked again.

    ``only``: the number of the one group that is read, or None for all. For each group, ``params`` has the list of its
    parameters, ``hyperparameters`` its hyperparameters (lr may be a tensor), and ``slots_depend_on`` those that decide
    which slots its parameters have.
    """

    def __init__(self, only: int | None) -> None:
        self._only = only
        self._held: list[tuple[Any, ...]] = []  # for each group, the values of _HELD; empty if they cannot be trusted
        self.params: list[list[Tensor]] = []
        self.hyperparameters: list[Hyperparameters] = []
        self.slots_depend_on: list[SlotsDependOn] = []

    def renew(self, groups: list[ParamGroup], read: Reading) -> None:
        """Read what the groups hold now; raise if a value is out of range."""
        own = groups if self._only is None else groups[self._only : self._only + 1]
        if not (self._held and isinstance(own, list) and engine.hold(own, ParamGroup, _HELD, self._held)):
            self._read(checked_groups(groups, read, self._only), read)
            return
        for index, group in enumerate(own):  # schedulers set another lr at each step
            lr, known = dict.get(group, "lr"), self.hyperparameters[index]
            if lr is not known.lr:
                self.hyperparameters[index] = read(group, reads=False) if lr is None else known.with_lr(lr)

    def _read(self, own: list[ParamGroup], read: Reading) -> None:
        self._held = []
        self.params = [group["params"] for group in own]
        self.hyperparameters = [read(group, reads=False) for group in own]
        self.slots_depend_on = [hyper.slots_depend_on for hyper in self.hyperparameters]
        held = [tuple(dict.get(group, key) for key in _HELD) for group in own]
        if all(type(value) in _CONSTANT for values in held for value in values[1:]):
            self._held = held


_HELD = ("params", *Hyperparameters._fields[1:])  # all that a step reads but lr
_CONSTANT = (
    float,
    int,
    bool,
    str,
    type(None),
)  # as long as it is the same object, its value does not change
